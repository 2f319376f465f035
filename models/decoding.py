"""The decoding half of a VAE as one network: latents as a pipeline samples them in, images out.

Axes: B batch, C channels, H and W height and width in latents.
"""

from functools import partial

from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ImageDecoder(nn.Module):
    """Everything between sampled latents and the image in [−1, 1]; its modules are the VAE's own, not copies."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.scaling, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def inputs(self, latents_BCHW: Tensor) -> Tensor:
        """What the decoder itself sees of them, in its dtype."""
        z_BCHW = (latents_BCHW / self.scaling + self.shift).to(self.decoder.conv_in.weight.dtype)
        return self.post_quant_conv(z_BCHW) if self.post_quant_conv is not None else z_BCHW

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        return self.decoder(self.inputs(latents_BCHW))

    def enable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = True
        self.decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def disable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = False
