"""Schedulers: another of diffusers' in the place of a model's own (`model.scheduler`), and what cannot be sampled with.

Two rules hold where one takes another's place. The noise schedule that the network was trained on (betas, zero terminal
SNR) and what it predicts stay as they are, always: a class that cannot keep them is refused. The timestep spacing stays
the one that the model's own sampler uses, also where its file leaves that to a default; where a class spaces its steps
in one way only, the log says which. Steps are not the same ones for all that: with spacing `leading` DPM++, UniPC and
DEIS space over one step more than DDIM and Euler.
"""

import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import diffusers
import numpy as np
import torch

from slimstep.engine.quiet import quiet
from slimstep.models.flow import FlowSteps, check_flow, is_flow, set_steps

log = logging.getLogger("slimstep")
SHORT = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "deis": "DEISMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler", "dpmsolver_single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler", "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler", "lcm": "LCMScheduler", "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler", "tcd": "TCDScheduler", "unipc": "UniPCMultistepScheduler",
}  # fmt: skip
OPTIONS = {"dpmsolver++": {"algorithm_type": "dpmsolver++"}}
# Where the model's own scheduler says nothing of them: latents are not clipped, and PNDM has no Runge-Kutta steps.
UNSAID = {"clip_sample": False, "skip_prk_steps": True}
# Of a noise schedule whose signal-to-noise ratio is shifted, which CogVideoX's own classes alone have.
SHIFTED = {"DDIMScheduler": "CogVideoXDDIMScheduler", "DPMSolverMultistepScheduler": "CogVideoXDPMScheduler"}
ONE_SPACING = {"DPMSolverSinglestepScheduler": "linspace", "LCMScheduler": "trailing", "TCDScheduler": "trailing"}
SPACINGS = ("leading", "linspace", "trailing")
SOLVERS_OWN = ("algorithm_type", "solver_type", "solver_order", "lower_order_final")  # they mean other things elsewhere
LEFT_OUT = ("clip_sample", "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
            "use_lu_lambdas")  # fmt: skip
READ_OR_NOT = (*LEFT_OUT, "rescale_betas_zero_snr", "trained_betas", "snr_shift_scale", "use_flow_sigmas",
               "timestep_spacing", "timestep_type")  # fmt: skip

NO_SAMPLE = ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
             "KDPM2AncestralDiscreteScheduler")  # fmt: skip  # they know ε and v
LEARNED = ("learned", "learned_range")  # variance_type of networks that predict the variance, too
KEEPS_PAST = "old_pred_original_sample"  # the last x̂, which CogVideoX's pipeline keeps for its DPM solver
# What pipelines give to a scheduler's step, the last two to CogVideoX's alone.
PIPELINES_GIVE = {"model_output", "timestep", "sample", "eta", "generator", KEEPS_PAST, "timestep_back"}
NO_IMAGE = 1e-12  # ᾱ where a schedule counts as zero terminal SNR to the last; some classes write 2^-24 for 0


def scheduler_class(name: str) -> type:
    """Diffusers' class of this name, long or short. ValueError, with the choices, for an unknown one."""
    class_name = SHORT.get(name.lower(), name)
    if class_name not in SHORT.values():
        raise ValueError(f"model.scheduler={name!r} is unknown; choose from {', '.join(SHORT)} or a class of diffusers")
    return getattr(diffusers, class_name)


def class_for(kind: type, scheduler) -> type:
    """The class that takes the place of one of diffusers' on the noise schedule of this scheduler."""
    is_shifted = "snr_shift_scale" in fields_of(type(scheduler))
    return getattr(diffusers, SHIFTED.get(kind.__name__, kind.__name__)) if is_shifted else kind


def changed_scheduler(scheduler, name: str | None, spacing: str | None):
    """The scheduler that `model.scheduler` and `model.timestep_spacing` ask for, without a word; the same for None."""
    swapped = replacement(scheduler, name) if name else scheduler
    return respaced(swapped, spacing) if spacing else swapped


def respaced(scheduler, spacing: str):
    """The scheduler with another `timestep_spacing`: few-step models that share a file with a model of many steps are
    sampled with `trailing`. Raises ValueError for an unknown one, and for a class that has one spacing or none."""
    kind = type(scheduler)
    if spacing not in SPACINGS:
        raise ValueError(f"model.timestep_spacing={spacing} is unknown; choose from {', '.join(SPACINGS)}")
    if "timestep_spacing" not in fields_of(kind) or ONE_SPACING.get(kind.__name__, spacing) != spacing:
        always = ONE_SPACING.get(kind.__name__, "in a way of its own")
        raise ValueError(f"model.timestep_spacing={spacing}: {kind.__name__} spaces its timesteps {always}, always")
    return built(kind, {**stated(scheduler), "timestep_spacing": spacing})


def swapped_scheduler(scheduler, name: str):
    """Another scheduler on the same noise schedule, which predicts the same and, where it can, spaces its steps alike.

    Fields that both have stay as they are, but for those of a solver alone. What the own sampler does and the other
    cannot (another spacing, clipping, Karras' sigmas, an end in clean latents) is logged. Raises ValueError for an
    unknown name, for a scheduler without betas, and for a class that cannot keep the noise schedule or does not know
    what the model predicts.
    """
    swapped = replacement(scheduler, name)
    tell(f"model.scheduler={name}", scheduler, swapped)
    return swapped


def replacement(scheduler, name: str):
    """What `swapped_scheduler` gives, without a word."""
    kind = class_for(scheduler_class(name), scheduler)
    check_noise_schedule(scheduler)
    if kind.__name__ in NO_SAMPLE and scheduler.config.prediction_type == "sample":
        raise ValueError(f"model.scheduler={name} does not know sample prediction, which is this model's; take ddim")
    if not can_keep(kind, scheduler):
        able = [short for short in SHORT if can_keep(class_for(scheduler_class(short), scheduler), scheduler)]
        raise ValueError(
            f"model.scheduler={name} cannot keep the noise schedule that this model was trained on "
            f"({schedule_in_words(scheduler)}); choose from {', '.join(able)}"
        )
    config = own_fields(scheduler, kind) | OPTIONS.get(name.lower(), {})
    if spacing := ONE_SPACING.get(kind.__name__, used_spacing(scheduler)):
        config["timestep_spacing"] = spacing
    return built(kind, config)


def own_fields(scheduler, kind: type) -> dict[str, Any]:
    """What a scheduler of this kind is made of, defaults of the own class included."""
    left = () if type(scheduler) is kind else SOLVERS_OWN
    return {**UNSAID, **{key: value for key, value in stated(scheduler).items() if key not in left}}


def stated(scheduler) -> dict[str, Any]:
    """A scheduler's configuration, whose every value counts for another class, too.

    diffusers notes which fields a file left open, and from_config takes the other class' defaults for those. It also
    keeps fields that the own class does not read, and another would.
    """
    unread = {"_use_default_values"} | {key for key in READ_OR_NOT if key not in fields_of(type(scheduler))}
    return {key: value for key, value in scheduler.config.items() if key not in unread}


def fields_of(kind: type) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


def reads_variance(scheduler) -> bool:
    """Whether its step takes a predicted variance behind the prediction."""
    return isinstance(scheduler, diffusers.DDPMScheduler) and scheduler.config.variance_type in LEARNED


def built(kind: type, config: dict[str, Any]):
    if config.get("variance_type") in LEARNED and kind is not diffusers.DDPMScheduler:
        # DeepFloyd IF's pipelines look whether it is a learned one, and split off the variance where it is none.
        config = {**config, "variance_type": None}
    with quiet():  # diffusers warns of fields that the other class has not
        return kind.from_config(config)


def tell(what: str, stored, swapped) -> None:
    """Logs what the own sampler does and the other does not."""
    spacing = used_spacing(stored)
    if spacing and (used := used_spacing(swapped)) != spacing:
        log.warning(f"{what} spaces its timesteps {used}, always; the model's own sampler uses {spacing}")
    if lost := [key for key in LEFT_OUT if stated(stored).get(key) and key not in fields_of(type(swapped))]:
        log.warning(f"{what} has no {', '.join(lost)}, which the model's own sampler uses")
    if type(swapped) is diffusers.DDIMScheduler and swapped.config.thresholding:
        log.warning(f"{what} thresholds x̂ and keeps the guided noise: with guidance more steps make worse images "
                    "(findings/thresholded_ddim_breaks_with_more_steps.sh); dpmsolver++ does not")  # fmt: skip
    if (end := final_sigma(swapped)) > 0:
        log.warning(f"{what} ends at σ = {end:.3g}, not in clean latents: at few steps images keep that noise")


def used_spacing(scheduler) -> str | None:
    """How a scheduler spaces its timesteps: what its field says, where its class reads that."""
    return ONE_SPACING.get(type(scheduler).__name__, scheduler.config.get("timestep_spacing"))


def final_sigma(scheduler) -> float:
    """σ at which sampling ends; 0 for schedulers that keep none."""
    if not hasattr(scheduler, "sigmas"):
        return 0.0
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(4)
    return float(scheduler.sigmas[-1])


# ---- what a network was trained on


def check_noise_schedule(scheduler) -> None:
    """ValueError for a scheduler whose network was not trained on betas: EDM, flow matching, continuous times."""
    config, alphas = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    why = None
    if not isinstance(alphas, torch.Tensor) or len(alphas) != config.get("num_train_timesteps"):
        why = "has no noise schedule of betas"
    elif config.get("use_flow_sigmas"):
        why = "has use_flow_sigmas=True"
    elif config.get("timestep_type", "discrete") != "discrete":
        why = f"has timestep_type={config.timestep_type}"
    if why:
        raise ValueError(
            f"the model's {type(scheduler).__name__} {why}: EDM and flow matching are given no other model.scheduler, "
            "and trained with EDMEulerScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler and "
            "solvers with use_flow_sigmas and prediction_type=flow_prediction alone; "
            "+experiment=evaluate and benchmark take one that its stock pipeline samples"
        )


def can_keep(kind: type, scheduler) -> bool:
    """Whether a class can have the noise schedule and the prediction of this scheduler."""
    if kind.__name__ in NO_SAMPLE and scheduler.config.prediction_type == "sample":
        return False
    try:
        return starts_finite(on_same_schedule(kind, scheduler, own_fields(scheduler, kind)))
    except ValueError:
        return False


def same_noise_schedule(scheduler, other) -> bool:
    """Whether both have the same ᾱ; some classes write 2^-24 where others have 0."""
    ours, theirs = scheduler.alphas_cumprod, other.alphas_cumprod
    return len(ours) == len(theirs) and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def starts_finite(scheduler) -> bool:
    """Samplers of σ / α have an infinite one where ᾱ is 0, but for those that know zero terminal SNR."""
    return not hasattr(scheduler, "sigmas") or bool(torch.as_tensor(scheduler.sigmas).isfinite().all())


def schedule_in_words(scheduler) -> str:
    config = scheduler.config
    if config.get("rescale_betas_zero_snr"):
        return "rescale_betas_zero_snr=True"
    has_own = config.get("trained_betas") is not None
    return "trained_betas" if has_own else f"beta_schedule={config.get('beta_schedule')}"


def on_same_schedule(kind: type, scheduler, config: dict[str, Any]):
    """A scheduler of this kind and configuration. ValueError where it has another noise schedule than `scheduler`."""
    with suppress(NotImplementedError):  # diffusers', for a beta_schedule that the class does not know
        made = built(kind, config)
        if same_noise_schedule(made, scheduler):
            return made
    words = schedule_in_words(scheduler)
    raise ValueError(f"{kind.__name__} cannot keep the noise schedule of the model's scheduler ({words})")


class ThresholdedDDIM(diffusers.DDIMScheduler):
    """DDIM for dynamic thresholding: the noise of a step is what the thresholded x̂ leaves.

    diffusers' own keeps the noise that the network predicted, unless the call says otherwise, which pipelines cannot:
    with guidance pictures break, the more steps the sooner (findings/thresholded_ddim_breaks_with_more_steps.sh).
    """

    def step(
        self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=True, generator=None,
        variance_noise=None, return_dict=True,
    ):  # fmt: skip
        return super().step(
            model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
        )


# ---- sampling


def check_sampling(scheduler, steps: int, flow: FlowSteps | None = None) -> None:
    """ValueError where the stock pipeline could not sample with this scheduler in so many steps, or not finitely.

    flow: how a pipeline of flow matching makes its steps, None for others.
    """
    name, kind = type(scheduler).__name__, type(scheduler)
    if flow and is_flow(scheduler):
        check_flow(scheduler)
        if timesteps_of(scheduler, steps, flow) is None:
            field = "shift_terminal"
            why = f" with {field}={scheduler.config.get(field):g}" if scheduler.config.get(field) else ""
            raise ValueError(f"{name} cannot make {steps} steps{why}")
        return
    absent = [a for a in ("init_noise_sigma", "scale_model_input", "order", "step") if not hasattr(scheduler, a)]
    parameters = inspect.signature(kind.step).parameters.values() if not absent else ()
    absent += [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
               and p.name not in PIPELINES_GIVE | {"self"}]  # fmt: skip
    if absent:
        raise ValueError(
            f"{name} is no scheduler for this model's pipeline ({', '.join(absent)}): flow matching and others of its "
            "kind are for pipelines that are made for them"
        )
    if (made := timesteps_of(scheduler, steps)) is None:
        others = (n for apart in range(1, 64) for n in (steps + apart, steps - apart) if n > 0)
        near = next((n for n in others if timesteps_of(scheduler, n) is not None), None)
        raise ValueError(f"{name} cannot make {steps} steps{f'; the nearest it can make is {near}' if near else ''}")
    if not starts_finite(scheduler):
        raise ValueError(
            f"{name} starts at an infinite σ, for its betas end in zero terminal SNR: model.scheduler=ddim"
        )
    check_blank(scheduler, made)


def keeps_past(call: Callable) -> bool:
    """Whether a scheduler's step takes the last x̂, or a pipeline's call keeps it."""
    return KEEPS_PAST in inspect.unwrap(call).__code__.co_varnames


def check_blank(scheduler, timesteps: torch.Tensor) -> None:
    """ValueError where a network that predicts ε is asked at a timestep without any of the image."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or scheduler.config.get("prediction_type") != "epsilon":
        return
    if blank := [int(t) for t in timesteps if alphas[int(t)] < NO_IMAGE]:
        raise ValueError(
            f"the model predicts ε, and at timestep {blank[0]} its {type(scheduler).__name__} has zero terminal SNR: "
            "there ε says nothing of the image, and latents are infinite; in its scheduler_config.json either "
            "prediction_type=epsilon or rescale_betas_zero_snr=true is wrong, or timestep_spacing must be leading"
        )


def timesteps_of(scheduler, steps: int, flow: FlowSteps | None = None) -> torch.Tensor | None:
    """None where the scheduler cannot make so many steps, or makes times that are not finite."""
    scheduler = copy.deepcopy(scheduler)
    try:
        with np.errstate(invalid="ignore"):  # one step with shift_terminal: 0 / 0
            set_steps(scheduler, steps, flow)
    except (ValueError, IndexError, ZeroDivisionError, KeyError, RuntimeError):  # numpy's and diffusers' own words
        return None
    return scheduler.timesteps if scheduler.timesteps.isfinite().all() else None
