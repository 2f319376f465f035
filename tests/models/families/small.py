"""Small random transformers of every family, by name, and how the tests of their blocks call them."""

import torch

from scripts.random_transformers import (
    OF_15,
    small_cogvideox,
    small_cogvideox_pipeline,
    small_flux,
    small_flux_pipeline,
    small_pixart,
    small_pixart_pipeline,
    small_qwen_image,
    small_qwen_image_pipeline,
    small_sana,
    small_sana_pipeline,
    small_sd3,
    small_sd3_pipeline,
    small_wan,
    small_wan_pipeline,
)
from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.networks.cogvideox import PrunableCogVideoXTransformer3DModel
from slimstep.models.families.transformer.networks.flux import PrunableFluxTransformer2DModel
from slimstep.models.families.transformer.networks.pixart import PrunablePixArtTransformer2DModel
from slimstep.models.families.transformer.networks.qwen import PrunableQwenImageTransformer2DModel
from slimstep.models.families.transformer.networks.sana import PrunableSanaTransformer2DModel
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.transformer.networks.wan import PrunableWanTransformer3DModel
from slimstep.models.family import denoiser_of

SD35 = {"dual_attention_layers": (0, 1, 3), "qk_norm": "rms_norm"}
ROTARY = {"use_rotary_positional_embeddings": True}
STOCK = {"SD3": small_sd3, "SD3.5": lambda: small_sd3(**SD35), "PixArt": small_pixart, "FLUX": small_flux,
         "Sana": small_sana, "Qwen-Image": small_qwen_image, "CogVideoX": small_cogvideox,
         "CogVideoX 5B": lambda: small_cogvideox(**ROTARY), "Wan": small_wan}  # fmt: skip
PIPELINES = {
    "SD3": small_sd3_pipeline, "SD3.5": lambda: small_sd3_pipeline(small_sd3(**SD35)), "PixArt": small_pixart_pipeline,
    "FLUX": small_flux_pipeline, "Sana": small_sana_pipeline, "Qwen-Image": small_qwen_image_pipeline,
    "CogVideoX": small_cogvideox_pipeline, "CogVideoX 5B": lambda: small_cogvideox_pipeline(**ROTARY),
    "CogVideoX 1.5": lambda: small_cogvideox_pipeline(**OF_15), "Wan": small_wan_pipeline,
}  # fmt: skip
PRUNABLE = {
    "SD3": PrunableSD3Transformer2DModel, "SD3.5": PrunableSD3Transformer2DModel,
    "PixArt": PrunablePixArtTransformer2DModel, "FLUX": PrunableFluxTransformer2DModel,
    "Sana": PrunableSanaTransformer2DModel, "Qwen-Image": PrunableQwenImageTransformer2DModel,
    "CogVideoX": PrunableCogVideoXTransformer3DModel, "CogVideoX 5B": PrunableCogVideoXTransformer3DModel,
    "Wan": PrunableWanTransformer3DModel,
}  # fmt: skip


def run(network, **options) -> torch.Tensor:
    """The prediction for three random samples, some of whose text is masked."""
    denoiser = denoiser_of(network)
    x_t, t_B, cond = denoiser.example(network, 3, tokens=7, generator=torch.Generator().manual_seed(0))
    if "text_mask" in cond.tensors:
        cond = Conditioning({**cond.tensors, "text_mask": (cond.tensors["text_mask"] > 0).float()})
    with torch.no_grad():
        return denoiser(network, x_t, t_B, cond, **options)
