"""Which other programs read an export, by the rules that stand in their source code. None of them was run.

ComfyUI (comfy/model_detection.py, 2025-10) and stable-diffusion.cpp (src/model/diffusion, 2026-08) take a network's
widths and depth from the weights, or from tables of the models that they know. Both read single files; the network's
own file in an export has diffusers' names, which both take.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusers import ModelMixin

from slimstep.models.card import Reading

COMFY, CPP = "ComfyUI", "stable-diffusion.cpp"


class UNetShape(NamedTuple):
    """The layers of the attentions that follow each ResNet of the way down, in the middle (-1: a ResNet alone; -2: no
    mid block) and on the way up, the outermost first; and the width of the text states."""

    down: tuple[int, ...]
    mid: int
    up: tuple[int, ...]
    text: int


BOTH = (COMFY, CPP)
# The published UNets that the tables of both, or of one of them, name. All have 320 channels in their outermost level.
KNOWN_UNETS = {
    UNetShape((1, 1, 1, 1, 1, 1, 0, 0), 1, (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0), 768): ("Stable Diffusion 1", BOTH),
    UNetShape((1, 1, 1, 1, 1, 1, 0, 0), 1, (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0), 1024): ("Stable Diffusion 2", BOTH),
    UNetShape((0, 0, 2, 2, 10, 10), 10, (0, 0, 0, 2, 2, 2, 10, 10, 10), 2048): ("Stable Diffusion XL", BOTH),
    UNetShape((0, 0, 2, 2, 4, 4), -1, (0, 0, 0, 1, 1, 2, 10, 4, 4), 2048): ("SSD-1B", BOTH),
    UNetShape((0, 0, 1, 1, 2, 2), -1, (0, 0, 0, 1, 1, 1, 2, 2, 2), 2048): ("Segmind Vega", BOTH),
    UNetShape((0, 2, 5), -2, (0, 0, 2, 2, 5, 5), 2048): ("KOALA-700M", (COMFY,)),
    UNetShape((0, 2, 6), 6, (0, 0, 2, 2, 6, 6), 2048): ("KOALA-1B", (COMFY,)),
    UNetShape((1, 1, 1), -2, (1, 1, 1, 1, 1, 1), 1024): ("SDXS-0.9", BOTH),
    UNetShape((0, 1, 1), -2, (0, 0, 1, 1, 1, 1), 768): ("SDXS-512", BOTH),
    UNetShape((1, 1, 1), -2, (1, 1, 1, 1, 1, 1), 768): ("BK-SDM-Tiny", (CPP,)),
}
# The widths that both have as constants, by fields of config.json.
FIXED_WIDTHS = {
    "FluxTransformer2DModel": {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096},
    "QwenImageTransformer2DModel": {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
    "PixArtTransformer2DModel": {"num_attention_heads": 16, "attention_head_dim": 72},
}
DIT_DEPTH_OF_CPP = 24  # what it begins to count from


def readers(network: ModelMixin, obstacles: Sequence[str]) -> dict[str, Reading]:
    """{program: whether it reads this network of an export, and why}; obstacles: why it is not diffusers' own class."""
    kind, config = type(network).__name__, network.config
    if obstacles:
        theirs = dict.fromkeys(BOTH, Reading(False, "the network is not of diffusers' own class"))
        return {"diffusers": Reading(True, "with trust_remote_code=True, the class travels in the folder"), **theirs}
    if kind == "UNet2DConditionModel":
        theirs = readers_of_unet(network)
    elif kind == "SD3Transformer2DModel":
        theirs = readers_of_sd3(config)
    elif kind in FIXED_WIDTHS:
        theirs = readers_of_counted(kind, config)
    else:
        theirs = dict.fromkeys(BOTH, Reading(False, f"no {kind} is among what it knows"))
    return {"diffusers": Reading(True, "every part is of diffusers' own class"), **theirs}


def readers_of_unet(unet: ModelMixin) -> dict[str, Reading]:
    name, known = KNOWN_UNETS.get(unet_shape(unet), ("", ()))
    if unet.config.block_out_channels[0] != 320:
        known = ()
    yes, no = Reading(True, f"its table has this UNet, {name}"), Reading(False, "its table has no UNet of these blocks")
    return {program: yes if program in known else no for program in BOTH}


def unet_shape(unet: ModelMixin) -> UNetShape:
    def layers(block) -> list[int]:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        return [len(getattr(attention, "transformer_blocks", ())) for attention in attentions]

    down = tuple(n for block in unet.down_blocks for n in layers(block))
    up = tuple(n for block in reversed(unet.up_blocks) for n in reversed(layers(block)))
    mid = unet.mid_block
    middle = -2 if mid is None else (layers(mid)[0] or -1)
    text = unet.config.cross_attention_dim
    return UNetShape(down, middle, up, text if isinstance(text, int) else text[0])


def readers_of_sd3(config: Mapping[str, Any]) -> dict[str, Reading]:
    depth, expected = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"] // 64
    comfy = f"it expects {expected} blocks, the width by 64, and there are {depth}"
    cpp = f"it expects {DIT_DEPTH_OF_CPP} blocks at least, and there are {depth}"
    return {COMFY: Reading(depth == expected, comfy), CPP: Reading(depth >= DIT_DEPTH_OF_CPP, cpp)}


def readers_of_counted(kind: str, config: Mapping[str, Any]) -> dict[str, Reading]:
    fixed = FIXED_WIDTHS[kind]
    if other := {name: config[name] for name, width in fixed.items() if config[name] != width}:
        name, width = next(iter(other.items()))
        counted = Reading(False, f"it has {name} {fixed[name]} as a constant, and the network has {width}")
    else:
        counted = Reading(True, "it counts the blocks")
    cpp = Reading(False, f"no {kind} is among what it knows") if kind == "PixArtTransformer2DModel" else counted
    return {COMFY: counted, CPP: cpp}
