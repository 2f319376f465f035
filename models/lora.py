"""LoRAs made for the stock UNet on a pruned one: what fits is loaded, what does not is named."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from models.pipeline import quiet


@dataclass(frozen=True)
class LoraFit:
    """Module paths of the UNet that a LoRA adapts: those that took it, and those that are no longer there."""

    applied: tuple[str, ...]
    left_out: tuple[str, ...]


def load_lora(pipeline: DiffusionPipeline, source: str | Path | dict[str, Tensor], adapter: str = "default") -> LoraFit:
    """Load a LoRA (a file, a folder, a hub id or a state dict) into the pipeline, without what was pruned away.

    Its part for the text encoder, if it has one, is loaded whole.

    Raises ValueError where nothing of it fits the UNet.
    """
    with quiet():
        weights, alphas = pipeline.lora_state_dict(source)[:2]
    present = {name for name, _ in pipeline.unet.named_modules()}
    unet_keys = {key: module_of(key) for key in weights if key.startswith("unet.")}
    applied = {path for path in unet_keys.values() if path in present}
    left_out = set(unet_keys.values()) - applied
    if not applied:
        raise ValueError(f"LoRA {source!s:.80} has no weights for this UNet; it adapts {sorted(left_out)[:3]}…")
    fitting = {key: value for key, value in weights.items() if unet_keys.get(key) not in left_out}
    alphas = {k: v for k, v in (alphas or {}).items() if k.startswith("unet.") is False or module_of(k) in applied}
    with quiet():
        pipeline.load_lora_into_unet(fitting, alphas, pipeline.unet, adapter_name=adapter, _pipeline=pipeline)
        pipeline.load_lora_into_text_encoder(
            weights, alphas, pipeline.text_encoder, lora_scale=pipeline.lora_scale, adapter_name=adapter,
            _pipeline=pipeline,
        )  # fmt: skip
    return LoraFit(tuple(sorted(applied)), tuple(sorted(left_out)))


def module_of(key: str) -> str:
    """The path of the module that a LoRA weight (`unet.PATH.lora_A.weight`, `unet.PATH.alpha`, …) adapts."""
    path = key.removeprefix("unet.")
    for end in (".lora", ".alpha", ".dora_scale"):
        path = path.split(end)[0]
    return path.removesuffix(".processor")
