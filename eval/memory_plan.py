"""What training needs of a device's memory, and which settings bring a large network below the sizes of GPUs; what
drawing images needs for weights.

Counted, not measured: allocators and libraries take some GB more.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, DiffusionPipeline
from torch import nn

from slimstep.engine.config import TrainConfig
from slimstep.eval.inputs import Teacher
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.pages.text import size
from slimstep.models.decoding import can_tile
from slimstep.models.family import denoiser_of, family_of
from slimstep.models.memory import Needed, decoding_bytes, evaluation_bytes, training_need
from slimstep.models.networks import encoders, network_of, text_encoders
from slimstep.models.pipeline import networks
from slimstep.models.sizes import frames_field, frames_step, has_own_positions, native_frames

GPUS = (24, 40, 80)  # GB
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}  # of a weight (engine/optimizers.py)
FLOAT32, HALF = 4, 2
LAST_OF_ONE = "train.batch_size=1, the rest by train.accumulation"
MOST_GPUS = "+hardware=fsdp on 8 GPUs"
EIGHT_BITS, NO_EMA = "train.optimizer=adamw8bit", "train.ema_decay=0"


Sample = Callable[[bool, bool], Needed]


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one device. Parameters, and what one sample needs (with checkpointing or not, by autocast or not), and
    what the settings make of them; `beside`: parameters of networks that are trained beside the student; `shards`: GPUs
    of FSDP; `shorter`: about half the frames of a video, and what one of so many needs."""

    parameters: int
    sample: Sample
    batch: int
    optimizer: str
    has_ema: bool
    checkpointing: bool
    is_half: bool
    lora_rank: int = 0
    beside: int = 0
    shards: int = 1
    shorter: tuple[int, Sample] | None = None

    @property
    def parts(self) -> dict[str, float]:
        per_weight = {"weights, gradients": 2 * FLOAT32, "optimizer": OPTIMIZER_BYTES[self.optimizer],
                      "EMA": FLOAT32 * self.has_ema}  # fmt: skip
        if self.lora_rank:  # what the low-rank update itself needs is next to nothing
            per_weight = {"weights, gradients": FLOAT32, "optimizer": 0, "EMA": 0}
        return {
            **{name: self.parameters * per / self.shards for name, per in per_weight.items()},
            **({"beside the student": self.beside * self.of_a_trained_weight} if self.beside else {}),
            "teacher": self.parameters * (HALF if self.is_half else FLOAT32),  # whole on every GPU
            "activations": self.running,
        }

    @property
    def running(self) -> float:
        """Activations, and in mixed precision the copies that autocast makes of the weights: of those that are trained
        it keeps them until a forward is over, and without checkpointing the backward needs them all."""
        need = self.sample(self.checkpointing, self.is_half)
        copies = HALF * self.parameters / self.shards if self.is_half else 0
        forward = self.batch * need.forward + (0 if self.lora_rank and self.checkpointing else copies)
        return max(forward, self.batch * need.step + (0 if self.checkpointing else copies))

    @property
    def of_a_trained_weight(self) -> int:
        """Bytes of a weight with its gradient and optimizer states; only the student has an EMA."""
        return 2 * FLOAT32 + OPTIMIZER_BYTES[self.optimizer]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory_lines(teacher: Teacher, trainings: list[TrainConfig], beside: int = 0) -> list[str]:
    """A line where the trainings fit into the smallest of GPUS, else a table of settings, too, and what fits where."""
    need = max((configured(teacher, config, beside) for config in trainings), key=lambda need: need.total)
    rest = sum(p.numel() * FLOAT32 for network in networks(teacher.pipeline) for p in network.parameters())
    rest -= need.parameters * FLOAT32
    parts = ", ".join(f"{size(value)} {name}" for name, value in need.parts.items() if value)
    line = f"memory     {size(need.total)} for training on every process: {parts} (batch {need.batch})"
    if need.total < GPUS[0] * 1e9:
        return [line]
    steps = list(smaller(need))
    rows = [[name, *(size(value) if (value := step.parts.get(part)) else "–" for part in need.parts), size(step.total)]
            for name, step in steps]  # fmt: skip
    table = markdown_table(["settings, each with those above", *need.parts, "together"], rows)
    fits = [next((name for name, step in steps if step.total <= gpu * 1e9), None) for gpu in GPUS]
    said = [f"{gpu} GB with {name}" if name else f"{gpu} GB with none of these"
            for gpu, name in zip(GPUS, fits, strict=True)]  # fmt: skip
    kind = "text encoders" if text_encoders(teacher.pipeline) else "image encoder"
    apart = f"{kind} and VAE ({size(rest)} in float32) run before training and rest in the host's memory"
    return [line, f"           {apart}", "", table.strip("\n"), "", f"fits into  {'; '.join(said)}"]


def drawing_lines(pipeline: DiffusionPipeline) -> list[str]:
    """What a model takes while it draws images."""
    return [*weight_lines(pipeline), *running_lines(pipeline)]


def weight_lines(pipeline: DiffusionPipeline) -> list[str]:
    """What the weights of a model take while it draws images, as they are loaded, and which are off the device then."""
    network, codec = network_of(pipeline), family_of(pipeline).codec(pipeline)
    parts = {"denoiser": weight_bytes([network]), "VAE": weight_bytes([codec] if codec else [])}
    drawing, said = sum(parts.values()), ", ".join(f"{size(value)} {name}" for name, value in parts.items() if value)
    half = ", half of it with model.dtype=bfloat16" if network.dtype == torch.float32 else ""
    lines = [f"drawing    {size(drawing)} of weights on the device: {said}{half}"]
    if encoding_bytes := weight_bytes(encoders(pipeline).values()):
        encoding = f"{size(drawing + encoding_bytes)} while prompts are encoded, once and before"
        kind = "text encoders" if text_encoders(pipeline) else "its image encoder"
        lines.append(f"           {encoding}: {size(encoding_bytes)} of {kind} then rest in the host's memory")
    return lines


def running_lines(pipeline: DiffusionPipeline) -> list[str]:
    """What lives beside the weights while one image or video is drawn, and decoded."""
    network, codec = network_of(pipeline), family_of(pipeline).codec(pipeline)
    what, shape = ("video" if native_frames(pipeline) else "image"), denoiser_of(network).sample_shape
    evaluation = evaluation_bytes(network, family_of(pipeline).tokens(pipeline)) * network.dtype.itemsize / FLOAT32
    lines = [f"           beside it {size(evaluation)} for an evaluation of one {what}, guided twice that"]
    if codec:
        ways = {"": {}, **({" with model.vae_tiling=true": {"is_tiled": True}} if can_tile(codec) else {})}
        if isinstance(codec, AutoencoderKLTemporalDecoder):
            ways |= {f" with 'model.video={{decode_chunk_size: {n}}}'": {"frames_at_once": n} for n in (8, 2)}
        per = codec.dtype.itemsize / FLOAT32
        each = []
        for way, how in ways.items():
            with suppress(ValueError):  # of tiles that do not fit together, which are no way
                each.append(f"{size(decoding_bytes(codec, shape, **how) * per)}{way}")
        lines.append(f"           or to decode one {what} {', '.join(each)}")
    return lines


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    return sum(weight.nbytes for network in networks for weight in network.parameters())


def configured(teacher: Teacher, config: TrainConfig, beside: int = 0) -> MemoryNeed:
    """What a training needs as it is configured."""
    unet, tokens = teacher.unet, teacher.text_length
    half = teacher.run.accelerator.mixed_precision in ("bf16", "fp16")
    return MemoryNeed(
        parameters=unet.num_parameters(), sample=partial(training_need, unet, tokens), batch=config.batch_size,
        optimizer=config.optimizer, has_ema=config.ema_decay > 0, checkpointing=config.gradient_checkpointing,
        is_half=half, lora_rank=config.lora_rank, beside=beside, shorter=half_as_long(teacher),
    )  # fmt: skip


def half_as_long(teacher: Teacher) -> tuple[int, Sample] | None:
    """Of a pipeline of videos that may be shorter: about half its frames, and what a sample of so many needs."""
    if not (frames := native_frames(teacher.pipeline)) or has_own_positions(teacher.unet):
        return None
    step = frames_step(teacher.pipeline)
    fewer = (frames - 1) // 2 // step * step + 1
    field = frames_field(teacher.unet, fewer)
    return fewer, partial(training_need, teacher.unet, teacher.text_length, **field)


def smaller(need: MemoryNeed) -> Iterator[tuple[str, MemoryNeed]]:
    """The settings that need less, one after the other, with what they are called on the command line; some stand for
    themselves, and say what they do not go with."""
    yield "as configured", need
    fsdp = {f"+hardware=fsdp on {gpus} GPUs": {"shards": gpus} for gpus in (2, 4, 8)}
    changes: dict[str, dict[str, Any]] = {
        "train.gradient_checkpointing=true": {"checkpointing": True},
        "mixed_precision=bf16": {"is_half": True},
        LAST_OF_ONE: {"batch": 1},
        EIGHT_BITS: {"optimizer": "adamw8bit"},
        NO_EMA: {"has_ema": False},
        **({"objective.fake_lora_rank=64": {"beside": 0}} if need.beside else fsdp),
    }
    without = need
    for name, change in changes.items():
        without = replace(without, **change)
        yield name, without
        if not need.lora_rank:
            yield from instead(name, without)


def instead(name: str, need: MemoryNeed) -> Iterator[tuple[str, MemoryNeed]]:
    """What can follow a setting without what else follows it."""
    apart = "(not with +hardware=fsdp)"
    if name == LAST_OF_ONE:
        low_rank = replace(need, lora_rank=64)
        yield f"train.lora_rank=64 {apart}", low_rank
        if need.shorter:
            frames, sample = need.shorter
            yield f"train.lora_rank=64 data.frames={frames} {apart}", replace(low_rank, sample=sample)
    if name == NO_EMA and not need.beside:
        yield f"train.optimizer=adafactor {apart}", replace(need, optimizer="adafactor")
    if name == MOST_GPUS and need.shorter:
        frames, sample = need.shorter
        yield f"{MOST_GPUS} data.frames={frames}", replace(need, sample=sample)
