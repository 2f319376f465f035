"""What training needs of a device's memory, and which settings bring a large network below the sizes of GPUs; what
drawing images needs for weights.

Counted, not measured: allocators and libraries take some GB more.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from slimstep.engine.config import TrainConfig
from slimstep.eval.inputs import Teacher
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.pages.text import size
from slimstep.models.cost import count_activation_bytes
from slimstep.models.family import family_of
from slimstep.models.networks import encoders, network_of, text_encoders
from slimstep.models.pipeline import networks

GPUS = (24, 40, 80)  # GB
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}  # of a weight (engine/optimizers.py)
FLOAT32, HALF = 4, 2
LAST_OF_ONE = "train.batch_size=1, the rest by train.accumulation"


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one device. Parameters, and activations of one sample in float32 (all, and with checkpointing), and
    what the settings make of them; `beside`: parameters of networks that are trained beside the student; `shards`: GPUs
    of FSDP."""

    parameters: int
    activations: int
    checkpointed: int
    batch: int
    optimizer: str
    has_ema: bool
    checkpointing: bool
    is_half: bool
    lora_rank: int = 0
    beside: int = 0
    shards: int = 1

    @property
    def parts(self) -> dict[str, float]:
        per_weight = {"weights, gradients": 2 * FLOAT32, "optimizer": OPTIMIZER_BYTES[self.optimizer],
                      "EMA": FLOAT32 * self.has_ema}  # fmt: skip
        if self.lora_rank:  # what the low-rank update itself needs is next to nothing
            per_weight = {"weights, gradients": FLOAT32, "optimizer": 0, "EMA": 0}
        kept = self.batch * (self.checkpointed if self.checkpointing else self.activations)
        return {
            **{name: self.parameters * per / self.shards for name, per in per_weight.items()},
            **({"beside the student": self.beside * self.of_a_trained_weight} if self.beside else {}),
            "teacher": self.parameters * (HALF if self.is_half else FLOAT32),  # whole on every GPU
            "activations": kept / (2 if self.is_half else 1),
        }

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
    """What the weights of a model take while it draws images, as they are loaded, and which are off the device then."""
    network, codec = network_of(pipeline), family_of(pipeline).codec(pipeline)
    parts = {"denoiser": weight_bytes([network]), "VAE": weight_bytes([codec] if codec else [])}
    drawing, said = sum(parts.values()), ", ".join(f"{size(value)} {name}" for name, value in parts.items() if value)
    half = ", half of it with model.dtype=bfloat16" if network.dtype == torch.float32 else ""
    lines = [f"drawing    {size(drawing)} of weights on the device: {said}{half}"]
    if resting := weight_bytes(encoders(pipeline).values()):
        encoding = f"{size(drawing + resting)} while prompts are encoded, once and before"
        kind = "text encoders" if text_encoders(pipeline) else "its image encoder"
        lines.append(f"           {encoding}: {size(resting)} of {kind} then rest in the host's memory")
    return lines


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    return sum(weight.nbytes for network in networks for weight in network.parameters())


def configured(teacher: Teacher, config: TrainConfig, beside: int = 0) -> MemoryNeed:
    """What a training needs as it is configured."""
    unet, tokens = teacher.unet, teacher.text_length
    activations = count_activation_bytes(unet, 1, tokens)
    # The inputs of all blocks, and all that one of them keeps while it is run again.
    inputs = count_activation_bytes(unet, 1, tokens, checkpointing=True)
    again = (activations - inputs) // max(1, len(unet.kept_blocks))
    half = teacher.run.accelerator.mixed_precision in ("bf16", "fp16")
    return MemoryNeed(
        parameters=unet.num_parameters(), activations=activations, checkpointed=inputs + again, batch=config.batch_size,
        optimizer=config.optimizer, has_ema=config.ema_decay > 0, checkpointing=config.gradient_checkpointing,
        is_half=half, lora_rank=config.lora_rank, beside=beside,
    )  # fmt: skip


def smaller(need: MemoryNeed) -> Iterator[tuple[str, MemoryNeed]]:
    """The settings that need less, one after the other, with what they are called on the command line."""
    yield "as configured", need
    fsdp = {f"+hardware=fsdp on {gpus} GPUs": {"shards": gpus} for gpus in (2, 4, 8)}
    changes: dict[str, dict[str, Any]] = {
        "train.gradient_checkpointing=true": {"checkpointing": True},
        "mixed_precision=bf16": {"is_half": True},
        LAST_OF_ONE: {"batch": 1},
        "train.optimizer=adamw8bit": {"optimizer": "adamw8bit"},
        "train.ema_decay=0": {"has_ema": False},
        **({"objective.fake_lora_rank=64": {"beside": 0}} if need.beside else fsdp),
    }
    without = need
    for name, change in changes.items():
        without = replace(without, **change)
        yield name, without
        if name == LAST_OF_ONE and not need.lora_rank:
            yield "train.lora_rank=64 (not with +hardware=fsdp)", replace(without, lora_rank=64)
