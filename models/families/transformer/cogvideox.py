"""CogVideoX: CogVideoXTransformer3DModel, whose blocks attend to video and text together.

It predicts v, by betas whose signal-to-noise ratio is shifted and ends at zero. The place of a token is added to it
(2B), or rotates queries and keys (5B) as its pipeline has it. All of its latents but the first are of several frames.
1.5 makes tokens of several latents, so that its pipeline puts some before the video, which are not decoded.

An image-conditioned network is also given, beside each latent, channels of the video's first frame: its latents beside
the first, and zeros beside the others. Guidance steers away from the empty caption of the same frame. The latents are
drawn from the posterior, by noise that is a function of the frame's pixels alone.

Axes: B batch, C channels, F frames, H and W height and width in latents, L tokens, E text width, D of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from PIL import Image
from torch import Tensor, nn

from slimstep.engine.seeding import generator
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import check_tiles, scaling_of
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.cogvideox import PrunableCogVideoXTransformer3DModel
from slimstep.models.first_frames import first_frames, noise_source, with_noise
from slimstep.models.sizes import latents_before, only_text_length

FRAME = "first_frame"
OFS = 2.0  # which its pipeline gives 1.5


class CogVideoXDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        config = network.config
        return {
            "hidden_states": frames_first(with_frame(x_t, cond[FRAME]) if FRAME in cond else x_t),
            "timestep": t_B,
            "encoder_hidden_states": cond["text"],
            "image_rotary_emb": rotary(config, x_t) if config.use_rotary_positional_embeddings else None,
            **({"ofs": x_t.new_full((1,), OFS)} if config.ofs_embed_dim else {}),
        }

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        return frames_first(output)

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config
        tokens = only_text_length(network) or tokens
        frame = {FRAME: (config.out_channels, *self.sample_shape[-2:])} if takes_frame(network) else {}
        return {"text": (tokens, config.text_embed_dim), **frame}


def frames_first(x: Tensor) -> Tensor:
    """[B, F, C, H, W], as the network and its pipeline have samples, from [B, C, F, H, W], and back."""
    return x.transpose(1, 2)


def takes_frame(network: nn.Module) -> bool:
    """Whether a network is image-conditioned."""
    return network.config.in_channels == 2 * network.config.out_channels


def with_frame(x_BCFHW: Tensor, frame_BCHW: Tensor) -> Tensor:
    """[B, 2·C, F, H, W]: beside the first latent those of the frame, and zeros beside the others."""
    beside_BCFHW = torch.zeros_like(x_BCFHW)
    beside_BCFHW[:, :, 0] = frame_BCHW
    return torch.cat([x_BCFHW, beside_BCFHW], dim=1)


def rotary(config: Mapping[str, Any], x_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D] of where each token is, of the size that the network was made for."""
    frames, *sides = x_BCFHW.shape[2:]
    sizes = *sides, config["sample_width"], config["sample_height"]
    height, width, *made_for = (size // config["patch_size"] for size in sizes)
    grid, options = (height, width), {"device": x_BCFHW.device}
    if config["patch_size_t"]:  # 1.5, whose positions are counted, and not stretched
        frames, crop = frames // config["patch_size_t"], None
        options |= {"grid_type": "slice", "max_size": tuple(reversed(made_for))}
    else:
        crop = get_resize_crop_region_for_grid(grid, *made_for)
    return get_3d_rotary_pos_embed(config["attention_head_dim"], crop, grid, frames, **options)


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """T5's states [B, L, E] of captions that are filled up, without a mask."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": device}
    return Conditioning({"text": pipeline.encode_prompt(prompts, **options)[0]})


def frames(config: Mapping[str, Any]) -> int:
    """Of the latents that a network of this configuration makes, those before the video among them."""
    count = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    return count + latents_before(config, count)


@torch.no_grad()
def frame_latents(pipeline: DiffusionPipeline, frames: Sequence[Tensor], noise: float = 0.0) -> Conditioning:
    """A row for each frame, uint8 [H, W, 3], with unit noise times `noise`; one by one, so that its bits do not depend
    on the others."""
    vae = pipeline.vae

    def of(frame: Tensor) -> Tensor:
        picture = Image.fromarray(frame.cpu().numpy())
        pixels_13HW = with_noise(pipeline, picture, noise, generator("first frame's noise", picture.tobytes().hex()))
        posterior = vae.encode(pixels_13HW[:, :, None].to(vae.device, vae.dtype)).latent_dist
        check_tiles(vae, pixels_13HW, posterior.mean)
        return frame_scaling(vae) * posterior.sample(noise_source(picture))[:, :, 0]

    return Conditioning({FRAME: torch.cat([of(frame) for frame in frames])})


def frame_scaling(vae: Any) -> float:
    """What the latents of a first frame are multiplied by."""
    return 1 / scaling_of(vae) if vae.config.invert_scale_latents else scaling_of(vae)


@dataclass(frozen=True)
class ImageFamily(TransformerFamily):
    """Networks that are given the first frame, too: a prompt is its caption, by which the pipeline remembers it."""

    def owns(self, network: nn.Module) -> bool:
        return takes_frame(network)

    def channels(self, network: nn.Module) -> int:
        return network.config.out_channels

    def check(self, name_or_path: str | Path) -> None:
        super().check(name_or_path)
        fields = self.NETWORK.STOCK.load_config(str(name_or_path), subfolder=self.PART)
        taken, given = fields.get("in_channels", 16), fields.get("out_channels", 16)
        if taken != 2 * given:
            channels = f"in_channels={taken} and out_channels={given}"
            raise ValueError(f"model {str(name_or_path)!r} has a transformer with {channels}; it must take twice as "
                             "many as it gives, those of the first frame beside each latent's own")  # fmt: skip

    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None
    ) -> Conditioning:
        text = super().encode(pipeline, prompts, device)
        frame = frame_latents(pipeline, first_frames(pipeline, prompts)).to(text.tensors["text"].device)
        return Conditioning({**text.tensors, **frame.tensors})


SHARED: dict[str, Any] = {
    "NETWORK": PrunableCogVideoXTransformer3DModel, "DENOISER": CogVideoXDenoiser, "encoded": encoded,
    "max_tokens": 226, "as_tokens": frames_first, "latent_frames": frames, "is_flow": False,
}  # fmt: skip
FAMILY = TransformerFamily(
    NAME="CogVideoX: a CogVideoXPipeline with a CogVideoXTransformer3DModel",
    PIPELINES=("CogVideoXPipeline",),
    refused=("ofs_embed_dim", "use_learned_positional_embeddings"),
    single_file=(("patch_embed.proj.weight", "patch_embed.text_proj.weight", "time_embedding.linear_1.weight"),),
    **SHARED,
)
OF_IMAGES = ImageFamily(
    NAME="CogVideoX of first frames: a CogVideoXImageToVideoPipeline with a CogVideoXTransformer3DModel",
    PIPELINES=("CogVideoXImageToVideoPipeline",),
    **SHARED,
)
