"""Qwen-Image: QwenImageTransformer2DModel, whose blocks hold image and text apart.

Its latents are those of one frame of a video VAE, packed two by two into tokens. Its guidance is classifier-free, and
each token of what is guided gets the length that it has in the plain prediction.

Axes: B batch, L tokens, E text width, C channels, H and W height and width in latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.flux import packed, unpacked
from slimstep.models.families.transformer.networks.qwen import PrunableQwenImageTransformer2DModel

EMPTY = " "  # the negative prompt of the examples in diffusers: of an empty one there would be no guidance


class QwenImageDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        height, width = (side // 2 for side in x_t.shape[-2:])
        return {
            "hidden_states": packed(x_t),
            "timestep": t_B.to(x_t.dtype) / 1000,
            "encoder_hidden_states": cond["text"],
            "encoder_hidden_states_mask": cond["text_mask"] > 0,
            "img_shapes": [[(1, height, width)]] * len(x_t),
        }

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        return unpacked(output, *x_t.shape[-2:])

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        tokens, lengths = packed(guided), packed(plain).norm(dim=-1, keepdim=True)
        return unpacked(tokens * (lengths / tokens.norm(dim=-1, keepdim=True)), *guided.shape[-2:])

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, network.config.joint_attention_dim), "text_mask": (tokens,)}


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """Qwen's states [B, L, E] and which of them are the caption's [B, L], 1 or 0, filled up to the same L for all."""
    prompts = [EMPTY] if is_negative else prompts
    text_BlE, mask_Bl = pipeline.encode_prompt(prompts, device=device, max_sequence_length=length)
    mask_Bl = text_BlE.new_ones(text_BlE.shape[:2]) if mask_Bl is None else mask_Bl.to(text_BlE.dtype)
    empty = length - text_BlE.shape[1]
    text_BLE, mask_BL = nn.functional.pad(text_BlE, (0, 0, 0, empty)), nn.functional.pad(mask_Bl, (0, empty))
    return Conditioning({"text": text_BLE, "text_mask": mask_BL})


FAMILY = TransformerFamily(
    NAME="Qwen-Image: a QwenImagePipeline with a QwenImageTransformer2DModel",
    NETWORK=PrunableQwenImageTransformer2DModel,
    PIPELINES=("QwenImagePipeline",),
    DENOISER=QwenImageDenoiser,
    encoded=encoded,
    max_tokens=512,
    packing=2,
    as_tokens=packed,
    own_options=lambda scale: {"negative_prompt": EMPTY, "true_cfg_scale": scale},
    own_sigmas=True,
    refused=("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope", "zero_cond_t"),
    single_file=(("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"),),
)
