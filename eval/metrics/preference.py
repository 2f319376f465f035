"""Scores that were trained on which of two images people preferred, beside CLIP score.

A preference is any callable `(images_B3HW, prompts) -> scores_B`: uint8 images, as many prompts, float32 on the CPU.
`evaluation.preferences.NAME._target_` makes it, is given the device, and raises ValueError for what cannot be had.
HPSv2 needs no code of its own: it is `ClipScorer` with other weights. ImageReward is not offered: its package
(image-reward 1.5) does not import beside transformers 5, which this project wants.

Axes: B images, H and W pixels, D feature width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import AutoProcessor, CLIPModel

from slimstep.models.pipeline import one_line


class PickScore:
    """PickScore (Kirstain et al. 2023): the learned logit scale times the cosine of a CLIP trained on Pick-a-Pic.

    `model` and `processor` are transformers folders or hub ids.
    """

    def __init__(self, model: str, processor: str, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        try:
            self.model, loading_info = CLIPModel.from_pretrained(model, output_loading_info=True)
            self.processor = AutoProcessor.from_pretrained(processor)
        except Exception as error:  # readers of damaged files raise whatever they stumble over
            said = one_line(error)[:160]
            if Path(model).is_dir():
                raise ValueError(f"PickScore: {model} or {processor} cannot be read: {said}") from error
            way = "download both once without HF_HUB_OFFLINE=1, or give folders"
            raise ValueError(f"PickScore: {model} or {processor} is not in the hub cache: {way} ({said})") from error
        if absent := sorted(loading_info["missing_keys"]):
            raise ValueError(f"PickScore: {model} is no CLIP model with its weights: {absent[0]} … are absent")
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        pictures = [to_pil_image(image) for image in images_B3HW.cpu()]
        pixels = self.processor(images=pictures, return_tensors="pt").to(self.device)
        tokens = self.processor(text=list(prompts), padding=True, truncation=True, max_length=longest,
                                return_tensors="pt").to(self.device)  # fmt: skip
        image_BD = F.normalize(self.model.get_image_features(**pixels).pooler_output, dim=-1)
        text_BD = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        return (self.model.logit_scale.exp() * (image_BD * text_BD).sum(1)).float().cpu()
