"""Schedulers by name: `model.scheduler` puts another of diffusers' in the place of the model's own."""

import diffusers

from models.quiet import quiet

SHORT = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "deis": "DEISMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler", "dpmsolver_single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler", "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler", "lcm": "LCMScheduler", "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler", "tcd": "TCDScheduler", "unipc": "UniPCMultistepScheduler",
}  # fmt: skip
OPTIONS = {"dpmsolver++": {"algorithm_type": "dpmsolver++"}}

NO_SAMPLE = ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
             "KDPM2AncestralDiscreteScheduler")  # fmt: skip  # they know ε and v


def scheduler_class(name: str) -> type:
    """Diffusers' class of this name, long or short. ValueError, with the choices, for an unknown one."""
    class_name = SHORT.get(name.lower(), name)
    if class_name not in SHORT.values():
        raise ValueError(f"model.scheduler={name!r} is unknown; choose from {', '.join(SHORT)} or a class of diffusers")
    return getattr(diffusers, class_name)


def swapped_scheduler(scheduler, name: str):
    """Another scheduler on the same noise schedule, which predicts the same; fields that both have stay as they are.

    Latents are not clipped where the model's own configuration says nothing of it, as diffusers would by default.
    Raises ValueError for an unknown name, and for a class that does not know what the model predicts.
    """
    if scheduler_class(name).__name__ in NO_SAMPLE and scheduler.config.prediction_type == "sample":
        raise ValueError(f"model.scheduler={name} does not know sample prediction, which is this model's; take ddim")
    config = {"clip_sample": False, **scheduler.config, **OPTIONS.get(name.lower(), {})}
    with quiet():  # diffusers warns of fields that the other class has not
        return scheduler_class(name).from_config(config)
