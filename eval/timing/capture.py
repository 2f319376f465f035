"""Sampling as one CUDA graph: all denoising steps and the decoder are launched at once.

What the host costs an eager loop at every step, this one costs it once an image. The graph is that of one batch size,
one number of steps and one guidance scale; new prompts and new noise are copied into its inputs.

Axes: B batch, C channels, H and W height and width.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from slimstep.eval.sampling import Sampler, eight_bits
from slimstep.eval.timing.graphs import CannotCaptureError, CapturedCall
from slimstep.eval.timing.inference import CannotRunError
from slimstep.models.conditioning import Conditioning
from slimstep.models.family import family_of
from slimstep.models.networks import network_of


class CapturedSampler:
    """A sampler's loop and decoder on a CUDA device as one CUDA graph, captured at the first call.

    Schedulers that copy between host and device in their steps cannot be captured (those that draw noise, LCM, UniPC):
    the first call raises CannotRunError, before anything is captured.
    """

    def __init__(self, sampler: Sampler):
        self.sampler, self.pipeline, self.graph = sampler, sampler.pipeline, None

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], noise_BCHW: Tensor) -> list[Image.Image]:
        """The images of these prompts from this noise; always as many as at the first call."""
        device = network_of(self.pipeline).device
        family = family_of(self.pipeline)
        both = family.encode(self.pipeline, prompts, device), family.unconditional(self.pipeline, device)
        if self.graph is None:
            self.capture(*both, noise_BCHW)
        for kept, new in zip((self.cond, self.uncond), both, strict=True):
            for name, tensor in new.tensors.items():
                kept.tensors[name].copy_(tensor)
        self.noise_BCHW.copy_(noise_BCHW)
        self.graph()
        return [to_pil_image(image) for image in self.images_B3HW.cpu()]

    def capture(self, cond: Conditioning, uncond: Conditioning, noise_BCHW: Tensor) -> None:
        unet = network_of(self.pipeline)
        self.cond, self.uncond = cond.map(Tensor.clone), uncond.map(Tensor.clone)
        self.noise_BCHW = noise_BCHW.to(unet.device, unet.dtype)

        def sample() -> None:
            latents_BCHW = self.sampler.denoise(unet, self.cond, self.noise_BCHW, uncond=self.uncond)
            self.images_B3HW = eight_bits(self.sampler.pixels(latents_BCHW))

        try:
            self.graph = CapturedCall(sample)
        except CannotCaptureError as error:
            raise CannotRunError(
                f"the loop of {type(self.sampler.scheduler).__name__} cannot be one CUDA graph: leave capture out, or "
                f"choose a scheduler that copies nothing between host and device in its steps, as DDIM ({error})"
            ) from error
