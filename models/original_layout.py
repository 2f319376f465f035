"""Stable Diffusion's weights in the layout of its first releases, which diffusers' from_single_file reads, backwards.

The names are those of CompVis/stable-diffusion's, Stability-AI/stablediffusion's and generative-models' modules. SD-1's
text encoder keeps its names from transformers; those of SD-2 and SDXL's second are OpenCLIP's, with the three
projections of an attention in one tensor.

Axes: E text width, P projection width, C channels.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from slimstep.engine.files import write_tensors
from slimstep.models.checkpoint import PREDICTION, PREDICTIONS
from slimstep.models.networks import network_of
from slimstep.models.vae import NarrowAutoencoderKL

UNET, VAE = "model.diffusion_model", "first_stage_model"
TEXT, OPEN_TEXT = "cond_stage_model.transformer.text_model", "cond_stage_model.model"
TEXTS_XL = ("conditioner.embedders.0.transformer.text_model", "conditioner.embedders.1.model")
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
RESNET_NAMES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OPEN_NAMES = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def original_weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline of SD-1's, SD-2's or SDXL's kind as one state dict; most share the pipeline's memory.

    Raises ValueError where a part has no place in that layout.
    """
    check_layout(pipeline)
    weights = dict(unet_weights(pipeline.unet))
    weights |= vae_weights(pipeline.vae)
    if getattr(pipeline, "text_encoder_2", None) is not None:
        weights |= clip_weights(pipeline.text_encoder, TEXTS_XL[0])
        weights |= open_clip_weights(pipeline.text_encoder_2, TEXTS_XL[1])
    elif is_open_clip(pipeline.text_encoder):
        weights |= open_clip_weights(pipeline.text_encoder, OPEN_TEXT)
    else:
        weights |= clip_weights(pipeline.text_encoder, TEXT)
    return weights


def write_original(pipeline: DiffusionPipeline, file: Path) -> None:
    """One .safetensors file in the original layout, whole or absent. Raises what `original_weights` raises.

    What the pipeline predicts, which no weight tells, is said twice: as ModelSpec's metadata and, for SD-1 and SDXL, as
    the keys that web UIs look for, `v_pred` and `ztsnr`.
    """
    weights, scheduler = original_weights(pipeline), pipeline.scheduler.config
    prediction = {name: said for said, name in PREDICTIONS.items()}[scheduler.prediction_type]
    is_sd2 = any(key.startswith(OPEN_TEXT) for key in weights)
    keys = {"v_pred": prediction == "v" and not is_sd2, "ztsnr": scheduler.get("rescale_betas_zero_snr", False)}
    weights |= {key: torch.zeros(0) for key, is_so in keys.items() if is_so}
    write_tensors(file, weights, {"format": "pt", "modelspec.sai_model_spec": "1.0.0", PREDICTION: prediction})


def check_layout(pipeline: DiffusionPipeline) -> None:
    """ValueError, which names the reason and the way out, for a pipeline that the original layout cannot hold."""
    network = network_of(pipeline)
    if not isinstance(network, UNet2DConditionModel):
        kind = type(network).__name__.removeprefix("Prunable")
        only = "single files are written of Stable Diffusion's UNets alone: hand its diffusers folder over instead"
        raise ValueError(f"this pipeline has a {kind}; {only}")
    if not hasattr(pipeline, "vae"):
        kind = type(pipeline).__name__
        raise ValueError(f"this {kind} has no VAE, and the original layout one; hand its diffusers folder over instead")
    unet, vae = pipeline.unet, pipeline.vae
    reasons = []
    if pruned := sorted(getattr(unet, "architecture", {})):
        reasons.append(f"its UNet is pruned ({', '.join(pruned[:3])}{' …' if len(pruned) > 3 else ''})")
    elif unusual := [field for field, usual in USUAL_FIELDS.items() if unet.config.get(field, usual[0]) not in usual]:
        fields = ", ".join(f"{field}={unet.config[field]}" for field in unusual)
        reasons.append(f"its UNet is not one of Stable Diffusion's ({fields})")
    if isinstance(vae, NarrowAutoencoderKL) and vae.is_pruned:
        reasons.append("its VAE decoder is pruned")
    elif not isinstance(vae, AutoencoderKL):
        reasons.append(f"its VAE is {type(vae).__name__}")
    if reasons:
        raise ValueError(
            f"this pipeline has no original layout, since {' and '.join(reasons)}; programs that read single files "
            "know the stock networks only: hand its diffusers folder over instead"
        )


USUAL_FIELDS = {
    "layers_per_block": (2,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "time_cond_proj_dim": (None,),
    "class_embed_type": (None,), "encoder_hid_dim_type": (None,), "addition_embed_type": (None, "text_time"),
}  # fmt: skip


def unet_weights(unet: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
    """The UNet's weights under their original names."""
    weights = unet.state_dict()
    for key, value in weights.items():
        yield f"{UNET}.{unet_name(key, weights, unet.config.layers_per_block)}", value


def unet_name(key: str, keys: Mapping[str, Tensor], layers: int) -> str:
    """`input_blocks.1.0.in_layers.2.weight` for `down_blocks.0.resnets.0.conv1.weight`; blocks are numbered through."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        side, level, kind, i, rest = match.groups()
        number = (layers + 1) * int(level) + int(i) + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
        return f"{place}.{renamed(rest, RESNET_NAMES) if kind == 'resnets' else rest}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.(.*)", key):
        behind = 2 if any(other.startswith(f"up_blocks.{match[1]}.attentions.") for other in keys) else 1
        return f"output_blocks.{(layers + 1) * int(match[1]) + layers}.{behind}.{match[2]}"
    if match := re.match(r"mid_block\.resnets\.(\d)\.(.*)", key):
        return f"middle_block.{2 * int(match[1])}.{renamed(match[2], RESNET_NAMES)}"
    return renamed(key.replace("mid_block.attentions.0", "middle_block.1"), UNET_NAMES)


def vae_weights(vae: AutoencoderKL) -> Iterator[tuple[str, Tensor]]:
    """The VAE's weights under their original names; the projections of its attention are 1×1 convolutions."""
    levels = len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        is_linear = ".attentions." in key and value.ndim == 2
        yield f"{VAE}.{vae_name(key, levels)}", value[..., None, None] if is_linear else value


def vae_name(key: str, levels: int) -> str:
    """Levels of the decoder are numbered from the inside out, and the other way round there."""
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    return renamed(key, VAE_NAMES)


def is_open_clip(text_encoder: nn.Module) -> bool:
    """Whether a text encoder is of OpenCLIP's kind: OpenAI's has another activation."""
    return text_encoder.config.hidden_act == "gelu"


def text_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Without the wrapper that transformers puts around the text encoders which have a projection."""
    return {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}


def clip_weights(text_encoder: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's weights under the names of transformers."""
    for key, value in text_weights(text_encoder).items():
        yield f"{prefix}.{key}", value


def open_clip_weights(text_encoder: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A text encoder's weights under OpenCLIP's names: queries, keys and values [3E, E] in one, the projection [E, P]
    the other way round."""
    weights = text_weights(text_encoder)
    for key, value in weights.items():
        if key == "text_projection.weight":
            yield f"{prefix}.text_projection", value.T
        elif match := re.fullmatch(r"(.*\.self_attn)\.q_proj\.(weight|bias)", key):
            together = torch.cat([weights[f"{match[1]}.{name}_proj.{match[2]}"] for name in "qkv"])
            yield f"{prefix}.{renamed(f'{match[1]}.', OPEN_NAMES)}in_proj_{match[2]}", together
        elif not re.search(r"\.self_attn\.[kv]_proj\.", key):
            yield f"{prefix}.{renamed(key, OPEN_NAMES)}", value


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key with whole parts of its path replaced."""
    for name, original in names.items():
        key = re.sub(rf"(^|(?<=\.)){re.escape(name)}(?=\.|$)", original, key)
    return key
