"""UNets that are told their guidance scale, as diffusers' pipelines tell it: one evaluation per step instead of two."""

from accelerate.utils import extract_model_from_parallel
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor, nn

from models.unet import PrunableUNet2DConditionModel


def told_guidance_width(unet: nn.Module) -> int:
    """The width of the guidance embedding a UNet is fed, 0 for one that is guided from outside."""
    return extract_model_from_parallel(unet, keep_torch_compile=False).config.time_cond_proj_dim or 0


def guidance_embedding(w_B: Tensor, width: int) -> Tensor:
    """[B, width]: the sinusoids of w − 1 that diffusers' pipelines pass as `timestep_cond`."""
    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w_B - 1, embedding_dim=width)


def with_told_guidance(unet: PrunableUNet2DConditionModel, width: int) -> PrunableUNet2DConditionModel:
    """A copy that is told its guidance scale, and does not listen yet: its answers are those of `unet`."""
    told = PrunableUNet2DConditionModel.from_config(dict(unet.config), time_cond_proj_dim=width)
    missing, unexpected = told.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"time_embedding.cond_proj.weight"}, (missing, unexpected)
    nn.init.zeros_(told.time_embedding.cond_proj.weight)
    return told.to(next(unet.parameters()).device).train(unet.training)
