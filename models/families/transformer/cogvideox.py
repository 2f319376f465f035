"""CogVideoX: CogVideoXTransformer3DModel, whose blocks attend to video and text together.

It predicts v, by betas whose signal-to-noise ratio is shifted and ends at zero. The place of a token is added to it
(2B), or rotates queries and keys (5B) as its pipeline has it. All of its latents but the first are of several frames.

Axes: B batch, C channels, F frames, H and W height and width in latents, L tokens, E text width, D of a head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.cogvideox import PrunableCogVideoXTransformer3DModel


class CogVideoXDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        rotated = network.config.use_rotary_positional_embeddings
        return {
            "hidden_states": frames_first(x_t),
            "timestep": t_B,
            "encoder_hidden_states": cond["text"],
            "image_rotary_emb": rotary(network.config, x_t) if rotated else None,
        }

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        return frames_first(output)

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config  # it adds no positions to prompts of another length
        tokens = tokens if config.use_rotary_positional_embeddings else config.max_text_seq_length
        return {"text": (tokens, config.text_embed_dim)}


def frames_first(x: Tensor) -> Tensor:
    """[B, F, C, H, W], as the network and its pipeline have samples, from [B, C, F, H, W], and back."""
    return x.transpose(1, 2)


def rotary(config: Mapping[str, Any], x_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D] of where each token is, of the size that the network was made for."""
    frames, *sides = x_BCFHW.shape[2:]
    sizes = *sides, config["sample_width"], config["sample_height"]
    height, width, *made_for = (size // config["patch_size"] for size in sizes)
    grid = height, width
    crop = get_resize_crop_region_for_grid(grid, *made_for)
    return get_3d_rotary_pos_embed(config["attention_head_dim"], crop, grid, frames, device=x_BCFHW.device)


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """T5's states [B, L, E] of captions that are filled up, without a mask."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": device}
    return Conditioning({"text": pipeline.encode_prompt(prompts, **options)[0]})


def frames(config: Mapping[str, Any]) -> int:
    """Of the latents that a network of this configuration makes."""
    return (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1


FAMILY = TransformerFamily(
    NAME="CogVideoX: a CogVideoXPipeline with a CogVideoXTransformer3DModel",
    NETWORK=PrunableCogVideoXTransformer3DModel,
    PIPELINES=("CogVideoXPipeline",),
    DENOISER=CogVideoXDenoiser,
    encoded=encoded,
    max_tokens=226,
    as_tokens=frames_first,
    latent_frames=frames,
    is_flow=False,
    refused=("patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings"),
    single_file=(("patch_embed.proj.weight", "patch_embed.text_proj.weight", "time_embedding.linear_1.weight"),),
)
