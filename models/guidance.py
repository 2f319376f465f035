"""Classifier-free guidance (Ho & Salimans 2022): the one rule, and networks that take its scale as an input instead.

Axes: B batch, G guided rows.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser, guidance_embed_dim, guidance_embedding
from slimstep.models.families.deepfloyd import family as deepfloyd
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import family_of


def guided(
    denoiser: Denoiser,
    network: nn.Module,
    x_t: Tensor,
    t_B: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    w: float | Tensor,
    *,
    block_mask_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(guided, plain): pred(∅) + w·(pred(c) − pred(∅)) and pred(c), from one batch of the network, ∅'s rows last.
    The denoiser rescales what is guided, where its pipeline does.

    uncond: ∅, one row. w: a scale for all rows, which is rounded as in diffusers' pipelines; or the scales w_G of the
    first G rows, the others stay plain. These are w·pred(c) − (w − 1)·pred(∅), so that w = 1 is no guidance to the bit.
    """
    rows = len(w) if isinstance(w, Tensor) else len(x_t)
    if not rows:
        plain = denoiser(network, x_t, t_B, cond, block_mask_BN=block_mask_BN)
        return plain, plain

    def again(x: Tensor) -> Tensor:
        """With the first rows once more, for ∅; a timestep of no axis is for all rows."""
        return torch.cat([x, x[:rows]]) if x.ndim else x

    inputs = again(x_t), again(t_B), Conditioning.cat(cond, cond.rows(slice(rows)).emptied(uncond))
    preds = denoiser(network, *inputs, block_mask_BN=None if block_mask_BN is None else again(block_mask_BN))
    plain, empty_G = preds.split([len(x_t), rows])
    if not isinstance(w, Tensor):
        return denoiser.rescaled(empty_G + w * (plain - empty_G), plain), plain
    w_G = w.view(-1, *[1] * (x_t.ndim - 1))
    led_G = denoiser.rescaled(w_G * plain[:rows] - (w_G - 1) * empty_G, plain[:rows])
    return torch.cat([led_G, plain[rows:]]), plain


def with_guidance_embedding(unet: PrunableUNet2DConditionModel, width: int) -> PrunableUNet2DConditionModel:
    """A copy that takes its guidance scale as an input, of zero weight still: its predictions are those of `unet`.

    A network that has an embedding is given back as it is; ValueError where it has another width.
    """
    if (existing := guidance_embed_dim(unet)) not in (0, width):
        raise ValueError(f"distillation.guidance_embed_dim={width}, but the network's has {existing} numbers")
    if existing:
        return unet
    if (family := family_of(unet)) is deepfloyd:
        name = family.NAME.split(":")[0]
        raise ValueError(f"distillation.guidance_embed_dim={width}, but {name} gives its UNet no guidance scale")
    if not isinstance(unet, UNet2DConditionModel):
        kind = type(unet).__name__.removeprefix("Prunable")
        raise ValueError(f"distillation.guidance_embed_dim={width}, but a {kind} takes no guidance embedding")
    new = PrunableUNet2DConditionModel.from_config(dict(unet.config), time_cond_proj_dim=width)
    missing, unexpected = new.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"time_embedding.cond_proj.weight"}, (missing, unexpected)
    nn.init.zeros_(new.time_embedding.cond_proj.weight)
    return new.to(next(unet.parameters()).device).train(unet.training)


def with_fixed_guidance(unet: PrunableUNet2DConditionModel, w: float) -> PrunableUNet2DConditionModel:
    """A copy that takes no guidance scale and predicts what `unet` does at the scale `w`.

    What the embedding adds before the first layer of the time embedding goes into that layer's bias.
    """
    new = PrunableUNet2DConditionModel.from_config(dict(unet.config), time_cond_proj_dim=None)
    weights = unet.state_dict()
    projection, first = weights.pop("time_embedding.cond_proj.weight").double(), "time_embedding.linear_1"
    scale_1 = torch.tensor([w], device=projection.device)
    added = projection @ guidance_embedding(scale_1, projection.shape[1])[0].double()
    bias = weights[f"{first}.bias"]
    weights[f"{first}.bias"] = (bias + weights[f"{first}.weight"].double() @ added).to(bias.dtype)
    new.load_state_dict(weights)
    return new.to(projection.device, bias.dtype).train(unet.training)
