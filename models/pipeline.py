"""Loading a teacher pipeline around a prunable UNet, and handing a student over as an ordinary diffusers folder."""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from slimstep.engine.files import whole_folder, write_json
from slimstep.engine.quiet import one_line, preview, quiet
from slimstep.models.card import EXPORT_REPORT, Origin, Reading, origin_of, read_export_report, write_card
from slimstep.models.checkpoint import is_single_file
from slimstep.models.decoding import code_in_tiles
from slimstep.models.families.deepfloyd.cascade import load_first_stage
from slimstep.models.families.exported import chained
from slimstep.models.family import family_at, family_of, flow_of, schedule_for
from slimstep.models.first_frames import SVD, with_video_options
from slimstep.models.folder import check_pickles, check_variant, check_weights
from slimstep.models.lora import check_loras, fuse_loras
from slimstep.models.networks import (
    block_origins,
    encoders,
    forget_last_captions,
    network_of,
    part_of,
    trained_steps_of,
    with_block_origins,
    with_sequence_length,
    with_trained_steps,
    with_unet,
    without_memory,
)
from slimstep.models.readers import readers
from slimstep.models.schedulers import (
    changed_scheduler,
    check_sampling,
    respaced,
    scheduler_class,
    swapped_scheduler,
)
from slimstep.models.sizes import only_text_length

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class ExportReport:
    """What kind of folder an export is.

    is_stock: UNet and VAE are diffusers' own classes. obstacles: why not, by block. load: the Python that loads it.
    origin: whose student it is. blocks: {block of the full network: its paths here, none where it is removed}.
    readers: {program: whether it reads the network, and why} (models/readers.py).
    """

    is_stock: bool
    obstacles: tuple[str, ...]
    load: str
    origin: Origin | None = None
    blocks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    readers: Mapping[str, Reading] = field(default_factory=dict)


def load_pipeline(
    name_or_path: str | Path,
    dtype: DType | None = "float32",
    variant: str | None = None,
    allow_pickle: bool = False,
    single_file_config: str | None = None,
    scheduler: str | None = None,
    loras: Sequence[Any] = (),
    vae: str | None = None,
    max_sequence_length: int | None = None,
    timestep_spacing: str | None = None,
    trained_steps: int | None = None,
    first_stage: Mapping[str, Any] | None = None,
    video: Mapping[str, Any] | None = None,
    vae_tiling: bool = False,
) -> DiffusionPipeline:
    """A pipeline of a known family (models/family.py) whose `unet` is prunable, in eval mode on the CPU.

    name_or_path: a diffusers folder, exports of ours included, a hub id, or a single file in the original layout, whose
    configuration and tokenizer are those of `single_file_config` (models/single_file.py). HF_HUB_OFFLINE is obeyed.
    dtype: None is what the weights are stored in. variant: the weight files' infix ('fp16'). allow_pickle: read .bin,
    .ckpt and .pt files too. scheduler: another than the model's own (models/schedulers.py). loras: {path, scale}, fused
    in that order into UNet and text encoders. vae: another autoencoder (models/autoencoder.py).
    max_sequence_length: what the pipeline's call is to be given; None: what an export was made with, else its default.
    timestep_spacing: another than the scheduler's (`trailing`). trained_steps: the steps that a few-step model was
    distilled to, at whose timesteps alone it is trained on; None: those that an export's teacher was, else none.
    first_stage: {path, steps, guidance_scale, noise_level} of what draws the pictures that DeepFloyd IF's second stage
    makes larger (families/deepfloyd/cascade.py). video: {fps, motion_bucket_id, noise_aug_strength, decode_chunk_size}
    of Stable Video Diffusion, or {noise_aug_strength} of a CogVideoX that begins with a frame (models/first_frames.py);
    None: what an export was made with, else its pipeline's.
    vae_tiling: the autoencoder codes in tiles (models/decoding.py).
    Raises ValueError where one of them is none of these, or the pipeline has no such UNet.
    """
    check_pipeline(name_or_path, variant, allow_pickle, single_file_config, scheduler, loras, timestep_spacing)
    pipeline = read_pipeline(name_or_path, dtype, variant, allow_pickle, single_file_config, vae)
    fuse_loras(pipeline, loras)
    if scheduler:
        pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, scheduler))
    if timestep_spacing:
        pipeline.register_modules(scheduler=respaced(pipeline.scheduler, timestep_spacing))
    for module in networks(pipeline):
        module.eval()
        own_memory(module)
    pipeline.set_progress_bar_config(disable=True)
    if vae_tiling:
        code_in_tiles(pipeline)
    origin = origin_of(name_or_path)
    length = max_sequence_length or (origin and origin.max_sequence_length)
    if length and "max_sequence_length" not in inspect.signature(type(pipeline).__call__).parameters:
        raise ValueError(f"model.max_sequence_length={length}: a {type(pipeline).__name__} has no such argument")
    if length and (only := only_text_length(network_of(pipeline))) not in (None, length):
        kind = type(network_of(pipeline)).__name__.removeprefix("Prunable")
        raise ValueError(f"model.max_sequence_length={length}: this {kind} adds positions to prompts of {only} tokens "
                         "alone: set that, or null")  # fmt: skip
    is_whole = not getattr(network_of(pipeline), "architecture", None)  # a table is of the full model's own blocks
    blocks = (read_export_report(Path(name_or_path)) or {}).get("blocks", {}) if is_whole else {}
    with_trained_steps(pipeline, trained_steps or (origin and origin.trained_steps))
    check_trained_steps(pipeline)
    with_video_options(pipeline, video if video is not None else origin and origin.video)
    if first_stage:
        exact = dtype and getattr(torch, dtype)
        pipeline.__dict__["first_stage"] = load_first_stage(pipeline, first_stage, exact, variant, allow_pickle)
    return with_block_origins(with_sequence_length(pipeline, length), blocks)


def check_trained_steps(pipeline: DiffusionPipeline) -> None:
    """ValueError for a number of steps that the pipeline's scheduler cannot make, or of which none can be trained."""
    if not (steps := trained_steps_of(pipeline)):
        return
    if not 1 <= steps <= (timesteps := pipeline.scheduler.config.num_train_timesteps):
        raise ValueError(f"model.trained_steps={steps} must be between 1 and the scheduler's {timesteps} timesteps")
    try:
        check_sampling(pipeline.scheduler, steps, flow_of(pipeline))
        schedule_for(pipeline)
    except ValueError as error:
        raise ValueError(f"model.trained_steps={steps}: {one_line(error)}") from error


def upcast_vae(pipeline: DiffusionPipeline) -> None:
    """Puts a VAE that overflows in float16 into float32, for those who ask it themselves: pipelines of SDXL and of
    Stable Video Diffusion do when they are called, and want it as it was."""
    upcasts = hasattr(pipeline, "upcast_vae") or type(pipeline).__name__ == SVD
    if upcasts and pipeline.vae.config.force_upcast and pipeline.vae.dtype == torch.float16:
        pipeline.vae.float()


def read_pipeline(
    name_or_path: str | Path,
    dtype: DType | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    single_file_config: str | None = None,
    vae: str | None = None,
) -> DiffusionPipeline:
    """The pipeline as it is stored, its weights still in the memory-mapped files. Arguments are load_pipeline's."""
    try:
        with quiet():
            exact = dtype and getattr(torch, dtype)
            family = family_at(name_or_path)
            pipeline = family.read(name_or_path, exact, variant, allow_pickle, single_file_config, vae)
            check_filled(pipeline)
            return pipeline
    except Exception as error:  # tokenizers raises nothing more special for a damaged file
        reason = one_line(error)
        if reason.startswith("model.vae="):
            raise
        raise ValueError(f"model {str(name_or_path)!r} is incomplete or damaged: {reason}") from error


def check_filled(pipeline: DiffusionPipeline) -> None:
    """ValueError for a network of which weights were in no file."""
    for part, network in pipeline.components.items():
        if isinstance(network, nn.Module) and (missing := without_memory(network)):
            raise ValueError(f"the {part} lacks {len(missing)} of its weights, {preview(missing)}")


def check_pipeline(
    name_or_path: str | Path,
    variant: str | None = None,
    allow_pickle: bool = False,
    single_file_config: str | None = None,
    scheduler: str | None = None,
    loras: Sequence[Any] = (),
    timestep_spacing: str | None = None,
) -> None:
    """ValueError, before any weights are read, for what load_pipeline cannot load."""
    with quiet():
        if is_single_file(name_or_path):
            family_at(name_or_path).check_single_file(name_or_path, single_file_config, allow_pickle)
        else:
            family_at(name_or_path).check(name_or_path)
            check_variant(name_or_path, variant)
            check_pickles(name_or_path, variant, allow_pickle)
            check_weights(name_or_path, variant)
    if scheduler:
        scheduler_class(scheduler)
    if scheduler or timestep_spacing:
        stored_scheduler(name_or_path, scheduler, timestep_spacing)
    check_loras(loras)


def stored_scheduler(
    name_or_path: str | Path, scheduler: str | None = None, timestep_spacing: str | None = None
) -> Any:
    """The scheduler of a folder or hub id, or another in its place, without any weights; None for a single file.

    Raises ValueError where it cannot be read, or the other cannot take its place.
    """
    if is_single_file(name_or_path):
        return None
    try:
        with quiet():
            kind = getattr(diffusers, DiffusionPipeline.load_config(name_or_path)["scheduler"][1])
            stored = kind.from_pretrained(name_or_path, subfolder="scheduler")
    except (OSError, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:  # damaged in some way
        raise ValueError(f"model {str(name_or_path)!r} has no scheduler that can be read: {one_line(error)}") from error
    return changed_scheduler(stored, scheduler, timestep_spacing)


def export_pipeline(
    pipeline: DiffusionPipeline, folder: str | Path, variant: str | None = None, origin: Origin | None = None
) -> ExportReport:
    """Write a diffusers folder, aside and then renamed; an old one in its place is replaced.

    Where the architectures are ones that diffusers' own classes can express, the folder holds those and loads
    everywhere. Otherwise the class file of the UNet or VAE travels in it, and in every copy that is saved of it.
    export_report.json holds what is returned. All networks are written in the widest of their dtypes: pipelines of
    several do not run. variant: the weight files' infix. origin: where it is a student, whose, for a model card.
    ValueError where the folder holds anything but a pipeline.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"export folder {str(folder)!r} holds something else than a pipeline; name a new one")
    stock, obstacles, blocks = family_of(pipeline).exported(pipeline)
    # diffusers asks for some parts although the folder says that there are none.
    absent = {part for part, component in stock.components.items() if component is None}
    options = [f", {part}=None" for part in sorted(absent - {*stock._optional_components})]
    flag = "".join([*options, *([", trust_remote_code=True"] if obstacles else [])])
    load = f'DiffusionPipeline.from_pretrained("{folder}"{flag})'
    read_by = readers(network_of(stock), obstacles)
    went = chained(block_origins(pipeline), blocks)
    export = ExportReport(not obstacles, obstacles, load, origin, went, read_by)
    made = in_one_dtype(stock)
    forget_last_captions(made)
    with whole_folder(folder) as aside, quiet():
        made.save_pretrained(aside, variant=variant)
        write_json(aside / EXPORT_REPORT, asdict(export))
        if origin:
            write_card(aside)
        make_readable(aside)
    return export


def in_one_dtype(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with copies of the networks that are not in the widest of their dtypes."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    widest = functools.reduce(torch.promote_types, (part.dtype for part in parts.values()))
    copies = {name: copy.deepcopy(part).to(widest) for name, part in parts.items() if part.dtype != widest}
    return with_unet(pipeline, **{"unet": copies.pop(part_of(pipeline), network_of(pipeline)), **copies})


def networks(pipeline: DiffusionPipeline) -> Iterator[nn.Module]:
    return (part for part in pipeline.components.values() if isinstance(part, nn.Module))


def own_memory(module: nn.Module) -> None:
    """Move weights out of the memory-mapped file: its alignment picks other kernels, which round differently."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def on_device(module: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """The module on this device while the block runs; afterwards it is where it was."""
    before = next(module.parameters()).device
    try:
        yield module.to(device)
    finally:
        module.to(before)


def to_device(pipeline: DiffusionPipeline, device: str | torch.device) -> DiffusionPipeline:
    """The pipeline with its networks on the device, but for encoders of prompts: those while `encoders_on` runs."""
    kept_on_host = encoders(pipeline).values()
    for network in networks(pipeline):
        network.to("cpu" if network in kept_on_host else device)
    return pipeline


@contextmanager
def encoders_on(pipeline: DiffusionPipeline, device: str | torch.device) -> Iterator[None]:
    """Encoders of prompts on this device while the block runs; afterwards they are where they were."""
    with ExitStack() as stack:
        for encoder in encoders(pipeline).values():
            stack.enter_context(on_device(encoder, device))
        yield


def make_readable(folder: Path) -> None:
    """Weight files are written 0600; an export is for others."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
