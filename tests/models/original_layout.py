"""Stable Diffusion's weights in the layout of its first release: what diffusers' from_single_file reads, backwards.

The names are those of CompVis/stable-diffusion's modules; see also diffusers' convert_diffusers_to_original script.
"""

import re

from diffusers import DiffusionPipeline
from torch import Tensor

UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def original_layout(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a pipeline of SD-1.5's kind as one state dict."""
    text = pipeline.text_encoder.state_dict()
    weights = {f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.items()}
    weights |= {f"model.diffusion_model.{unet_name(k)}": v for k, v in pipeline.unet.state_dict().items()}
    levels = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        is_linear = "attentions" in key and "group_norm" not in key and key.endswith("weight")
        weights[f"first_stage_model.{vae_name(key, levels)}"] = value[..., None, None] if is_linear else value
    return {key: value.contiguous() for key, value in weights.items()}


def unet_name(key: str) -> str:
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", key):
        side, level, kind, i, rest = found.groups()
        number = 3 * int(level) + int(i) + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
        return f"{place}.{swapped(rest, UNET_RESNET) if kind == 'resnets' else rest}"
    if found := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op.{found[2]}"
    if found := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", key):
        return f"output_blocks.{3 * int(found[1]) + 2}.{1 if found[1] == '0' else 2}.{found[2]}"
    if found := re.match(r"mid_block\.resnets\.(\d)\.(.*)", key):
        return f"middle_block.{2 * int(found[1])}.{swapped(found[2], UNET_RESNET)}"
    return swapped(key.replace("mid_block.attentions.0", "middle_block.1"), UNET)


def vae_name(key: str, levels: int) -> str:
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    return swapped(key, VAE_NAMES)


def swapped(key: str, names: dict[str, str]) -> str:
    for name, original in names.items():
        key = re.sub(rf"(^|(?<=\.)){re.escape(name)}(?=\.)", original, key)
    return key
