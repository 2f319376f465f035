"""How the UNets of DeepFloyd IF are called (models/denoiser.py): with pixels and text; they predict a variance, too.

Their output [B, 2C, H, W] has what the scheduler's prediction type says in its first half. The second, from −1 to 1, is
where the logarithm of the variance of a sampler's step lies between its least and its largest (Nichol & Dhariwal 2021,
equation 15): DDPM's scheduler with `variance_type=learned_range` reads it, and all others do without.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS


@dataclass(frozen=True)
class DeepFloydDenoiser:
    """diffusers' UNet2DConditionModel as an IFPipeline or IFSuperResolutionPipeline has it, and its prunable subclass.

    The latter's takes the picture of the stage before beside x_t, and how noisy that is as its class.

    keeps_variance: whether a prediction is both halves of the output, or the first alone. Guidance leaves the variance
    as the text alone has it.
    """

    prediction_type: str
    sample_shape: tuple[int, int, int]
    keeps_variance: bool = False

    def __call__(
        self,
        network: nn.Module,
        x_t: Tensor,
        t_B: Tensor,
        cond: Conditioning,
        *,
        guidance_B: Tensor | None = None,
        block_mask_BN: Tensor | None = None,
    ) -> Tensor:
        assert guidance_B is None, "its pipelines give no guidance embedding"
        dtype = next(network.parameters()).dtype
        tensors, options = cond.to(dtype=dtype).tensors, dict[str, Any]()
        if block_mask_BN is not None:
            options["block_mask"] = block_mask_BN
        inputs = x_t.to(dtype)
        if "upscaled" in tensors:
            inputs = torch.cat([inputs, tensors["upscaled"]], dim=1)
            options["class_labels"] = tensors["noise_level"]
        output = network(inputs, t_B, tensors["text"], return_dict=False, **options)[0].to(x_t.dtype)
        return output if self.keeps_variance else output[:, : x_t.shape[1]]

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        channels = self.sample_shape[0]
        return torch.cat([guided[:, :channels], plain[:, channels:]], dim=1) if self.keeps_variance else guided

    def example(
        self, network: ModelMixin, batch: int, *, side: int | None = None, tokens: int = NUM_TOKENS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:  # fmt: skip
        channels, *sides = self.sample_shape

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(network.device, network.dtype)

        x_t = random(channels, *([side, side] if side else sides))
        width, t_B = network.config.encoder_hid_dim or network.config.cross_attention_dim, torch.full((batch,), 500)
        tensors, t_B = {"text": random(tokens, width)}, t_B.to(network.device)
        if network.config.in_channels > channels:
            tensors |= {"upscaled": random(*x_t.shape[1:]), "noise_level": t_B // 2}
        return x_t, t_B, Conditioning(tensors)
