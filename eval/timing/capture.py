"""Sampling as one CUDA graph: all denoising steps and the decoder are launched at once.

What the host costs an eager loop at every step, this one costs it once an image. The graph is that of one batch size,
one number of steps and one guidance scale; new prompts and new noise are copied into its inputs.

Axes: B batch, C channels, H and W height and width, L tokens, E text width.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from slimstep.eval.sampling import Sampler, Texts, eight_bits
from slimstep.eval.timing.graphs import CannotCaptureError, CapturedCall
from slimstep.eval.timing.setups import CannotRunError
from slimstep.models.conditioning import empty_text_state, text_states


class CapturedSampler:
    """A sampler's loop and decoder on a CUDA device, captured at the first call.

    Schedulers that copy between host and device in their steps cannot be captured (those that draw noise, LCM, UniPC):
    the first call raises CannotRunError, before anything is captured.
    """

    def __init__(self, sampler: Sampler):
        self.sampler, self.pipeline, self.graph = sampler, sampler.pipeline, None

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], noise_BCHW: Tensor) -> list[Image.Image]:
        """The images of these prompts from this noise; always as many as at the first call."""
        device = self.pipeline.unet.device
        texts = Texts(text_states(self.pipeline, prompts, device), empty_text_state(self.pipeline, device))
        if self.graph is None:
            self.capture(texts, noise_BCHW)
        self.texts.states_BLE.copy_(texts.states_BLE)
        self.texts.empty_1LE.copy_(texts.empty_1LE)
        self.noise_BCHW.copy_(noise_BCHW)
        self.graph()
        return [to_pil_image(image) for image in self.images_B3HW.cpu()]

    def capture(self, texts: Texts, noise_BCHW: Tensor) -> None:
        unet = self.pipeline.unet
        self.texts = Texts(texts.states_BLE.clone(), texts.empty_1LE.clone())
        self.noise_BCHW = noise_BCHW.to(unet.device, unet.dtype)

        def sample() -> None:
            latents_BCHW = self.sampler.denoise(unet, self.texts, self.noise_BCHW)
            self.images_B3HW = eight_bits(self.sampler.pixels(latents_BCHW))

        try:
            self.graph = CapturedCall(sample)
        except CannotCaptureError as error:
            raise CannotRunError(
                f"the loop of {type(self.sampler.scheduler).__name__} cannot be one CUDA graph: leave capture out, or "
                f"choose a scheduler that copies nothing between host and device in its steps, as DDIM ({error})"
            ) from error
