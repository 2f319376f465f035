"""Families of models: all that differs between them, and which of them a pipeline or a network is of.

What lies in a family's folder is listed in models/families/README.md.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.engine.quiet import quiet
from slimstep.models.checkpoint import is_single_file
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.families.ddpm import family as ddpm
from slimstep.models.families.deepfloyd import family as deepfloyd
from slimstep.models.families.deepfloyd.denoiser import DeepFloydDenoiser
from slimstep.models.families.exported import Exported
from slimstep.models.families.prunable import Prunable
from slimstep.models.families.svd import family as svd
from slimstep.models.families.svd.conditions import conditions_of
from slimstep.models.families.transformer import cogvideox, flux, pixart, qwen, sana, sd3, wan
from slimstep.models.families.transformer.others import OTHERS, REFUSED
from slimstep.models.families.transformer.single_file import names_in
from slimstep.models.families.unet2d import family as unet2d
from slimstep.models.first_frames import video_options
from slimstep.models.flow import FlowSteps, is_flow
from slimstep.models.networks import DENOISERS, network_of, trained_steps_of
from slimstep.models.noise_schedule import AnySchedule, schedule_of, trained_at_steps
from slimstep.models.sizes import sides_of


class Family(Protocol):
    """What a family's module `family` has.

    NAME: as errors list it. PART: what its pipelines call the network that denoises. NETWORK: the prunable network.
    IS_CONDITIONAL: whether prompts are captions. DRAWS_VIDEOS: whether it draws these, and not images. GUIDES: whether
    a second prediction, for the empty prompt, guides.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def PART(self) -> str: ...
    @property
    def NETWORK(self) -> type[Prunable]: ...
    @property
    def IS_CONDITIONAL(self) -> bool: ...
    @property
    def DRAWS_VIDEOS(self) -> bool: ...
    @property
    def GUIDES(self) -> bool: ...

    def matches(self, index: Mapping[str, Any]) -> bool:
        """Whether a pipeline with this model_index.json, which names a network PART, is of the family."""
        ...

    def owns(self, network: nn.Module) -> bool:
        """Whether a network of NETWORK's class, or of diffusers' own, is of the family: several have one class."""
        ...

    def is_in(self, names: Collection[str]) -> bool:
        """Whether a single file whose weights have these names, without prefixes, holds such a network."""
        ...

    def check(self, name_or_path: str | Path) -> None:
        """ValueError, before any weights are read, for a folder or hub id that `read` cannot load."""
        ...

    def check_single_file(self, file: str | Path, config: str | None, allow_pickle: bool) -> None:
        """The same for a single file; config: what model.single_file_config is."""
        ...

    def read(
        self,
        name_or_path: str | Path,
        dtype: torch.dtype | None,
        variant: str | None,
        allow_pickle: bool,
        single_file_config: str | None,
        vae: str | None,
    ) -> DiffusionPipeline:
        """The pipeline around a prunable network; arguments are those of models/pipeline.py's load_pipeline."""
        ...

    def exported(self, pipeline: DiffusionPipeline) -> Exported:
        """The pipeline with diffusers' own classes where they can express its networks."""
        ...

    def denoiser(self, network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
        """How the network is called."""
        ...

    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None
    ) -> Conditioning:
        """A row for each prompt, by encoders on this device (None: where they are); nothing of unconditional models."""
        ...

    def unconditional(self, pipeline: DiffusionPipeline, device: torch.device | None = None) -> Conditioning:
        """One row: what guidance steers away from."""
        ...

    def tokens(self, pipeline: DiffusionPipeline) -> int:
        """Of a prompt, as the network gets them."""
        ...

    def call(self, pipeline: DiffusionPipeline, guidance_scale: float, noise: Tensor | None = None) -> dict[str, Any]:
        """What the stock pipeline's call is given beside prompts and steps, so that it draws as we do; noise: unit
        noise [B, C, …, H, W], None where it draws its own."""
        ...

    def channels(self, network: nn.Module) -> int:
        """Of what is denoised."""
        ...

    def frames(self, network: nn.Module) -> int | None:
        """Latents along the time of a video that the network makes; None of images."""
        ...

    def draws_rectangles(self, pipeline: DiffusionPipeline) -> bool:
        """Whether a stock pipeline of this class reads from its folder a size that is no square."""
        ...

    def shrinks(self, network: nn.Module) -> int:
        """What sides of latents must be multiples of."""
        ...

    def flow(self, config: Mapping[str, Any]) -> FlowSteps | None:
        """How pipelines of flow matching make their steps, with a network of this configuration; None for others."""
        ...

    def codec(self, pipeline: DiffusionPipeline) -> ModelMixin | None:
        """The autoencoder between images and what is denoised (models/decoding.py); None where that is pixels."""
        ...


FAMILIES: tuple[Family, ...] = (
    unet2d, deepfloyd, ddpm, svd, sd3.FAMILY, pixart.FAMILY, flux.FAMILY, sana.FAMILY, qwen.FAMILY,
    cogvideox.OF_IMAGES, cogvideox.FAMILY, wan.FAMILY,
)  # fmt: skip


def family_at(name_or_path: str | Path) -> Family:
    """The family of a folder, hub id or single file. Raises ValueError for a pipeline of none."""
    if is_single_file(name_or_path):
        names = names_in(name_or_path)
        return next((family for family in FAMILIES if family.is_in(names)), unet2d)
    try:
        with quiet():
            index = DiffusionPipeline.load_config(str(name_or_path))
    except OSError:
        return unet2d  # whose check tells what is wrong with it
    part = next((part for part in DENOISERS if part in index), None) if isinstance(index, Mapping) else None
    if not isinstance(index, Mapping) or part and not is_named(index[part]):
        return unet2d
    for family in FAMILIES:
        if part == family.PART and family.matches(index):
            return family
    network = index[part][1] if part else None
    known = "; ".join(family.NAME for family in FAMILIES)
    which = f"is a {index.get('_class_name')} {f'with a {network}' if network else 'without a UNet or transformer'}"
    raise ValueError(f"model {str(name_or_path)!r} {which}, of which no family is known; these are: {known}"
                     f"{without_a_job(network)}")  # fmt: skip


def flow_of(pipeline: DiffusionPipeline) -> FlowSteps | None:
    """How a pipeline makes the steps of a flow."""
    network: Any = network_of(pipeline)
    return family_of(pipeline).flow(network.config)


def stored_flow(name_or_path: str | Path) -> FlowSteps | None:
    """How the pipelines of a folder or hub id make the steps of a flow, without any weights."""
    family = family_at(name_or_path)
    return family.flow(family.NETWORK.STOCK.load_config(str(name_or_path), subfolder=family.PART))


def without_a_job(network: str | None) -> str:
    """What can be done with a network whose pipelines no job drives."""
    if network in OTHERS:
        return f". Blocks of a {network} can be removed without a job (docs/models.md, Other transformers)"
    return f". Blocks of a {network} cannot be removed, either: {REFUSED[network]}" if network in REFUSED else ""


def draws_from_frames(family: Family) -> bool:
    """Whether its pipelines make videos of their first frames."""
    return family in (svd, cogvideox.OF_IMAGES)


def conditions_of_frames(pipeline: DiffusionPipeline, frames: Sequence[Tensor]) -> Conditioning:
    """What the first frames of training videos, uint8 [H, W, 3], say to the network, a row for each."""
    if family_of(pipeline) is svd:
        return conditions_of(pipeline, frames)
    return cogvideox.frame_latents(pipeline, frames, noise=video_options(pipeline).noise_aug_strength)


def conditions_of_captions(
    pipeline: DiffusionPipeline, captions: Sequence[str], device: torch.device | None = None
) -> Conditioning:
    """What the captions of training images or videos say, a row for each, beside what first frames do."""
    if (family := family_of(pipeline)) is svd:
        return Conditioning()
    return (cogvideox.FAMILY if family is cogvideox.OF_IMAGES else family).encode(pipeline, captions, device)


def is_named(part: Any) -> bool:
    return isinstance(part, (list, tuple)) and len(part) == 2


def family_of(model: DiffusionPipeline | nn.Module) -> Family:
    """The family of a pipeline that is loaded, or of a network, whatever it is wrapped in."""
    network = network_of(model) if isinstance(model, DiffusionPipeline) else model
    bare = extract_model_from_parallel(network, keep_torch_compile=False)
    families = (family for family in FAMILIES if isinstance(bare, family.NETWORK.STOCK))
    return next(family for family in families if family.owns(bare))


def denoiser_of(network: nn.Module, prediction_type: str = "epsilon") -> Denoiser:
    """The denoiser of a network by its class; `prediction_type` is its scheduler's, and any where none is trained."""
    family, bare = family_of(network), extract_model_from_parallel(network, keep_torch_compile=False)
    frames, sides = family.frames(bare), sides_of(bare.config)
    shape = (family.channels(bare), *([frames] if frames else []), *sides)
    return family.denoiser(network, prediction_type, shape)


def with_variance(denoiser: Denoiser) -> Denoiser | None:
    """The denoiser whose predictions have the variance behind them; None of networks that predict none."""
    return replace(denoiser, keeps_variance=True) if isinstance(denoiser, DeepFloydDenoiser) else None


def schedule_for(pipeline: DiffusionPipeline, scheduler: Any = None, device: str | torch.device = "cpu") -> AnySchedule:
    """The noise schedule of a pipeline, or of another scheduler in it; ValueError as `schedule_of` raises it.

    Where the pipeline was distilled to a few steps, it is trained at the timesteps of these alone.
    """
    scheduler = scheduler or pipeline.scheduler
    flow = flow_of(pipeline) if is_flow(scheduler) else None
    schedule = schedule_of(scheduler, device, flow)
    steps = trained_steps_of(pipeline)
    return trained_at_steps(schedule, pipeline.scheduler, steps) if steps else schedule
