"""The judgement of several UNets in one pipeline: the same prompts, the same noise, paired scores, one clock."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from data.files import write_json
from data.prompts import PromptSet
from engine.parallel import map_batches
from eval.clip import ClipScorer, psnr
from eval.compare import mean_and_error, paired_difference
from eval.sampling import Sampler


def judge(
    unets: Mapping[str, nn.Module],
    sampler: Sampler,
    scorer: ClipScorer,
    prompts: PromptSet,
    batch_size: int,
    accelerator: Accelerator,
) -> tuple[list[dict], dict[str, Tensor]]:
    """One record per UNet, compared prompt by prompt with the first, and its uint8 images [n, 3, H, W]."""
    texts, features = prompts.prompts, scorer.text(prompts.prompts)
    records, images, scores = [], {}, {}
    for name, unet in unets.items():
        draw = partial(sampler.images, unet, texts)
        images[name] = map_batches(draw, len(texts), batch_size, accelerator, f"images of {name}")
        scores[name] = clip_scores(images[name], features, scorer, batch_size, accelerator, f"CLIP of {name}").tolist()
        mean, teacher = mean_and_error(scores[name]), next(iter(unets))
        records.append({
            "name": name,
            "clip": {"mean": mean.mean, "se": mean.se, "per_prompt": scores[name]},
            "psnr_to_teacher": psnr(images[name], images[teacher]).mean().item() if name != teacher else None,
            "versus_teacher": asdict(paired_difference(scores[name], scores[teacher])) if name != teacher else None,
        })  # fmt: skip
    return records, images


def clip_scores(
    images_B3HW: Tensor, text_BD: Tensor, scorer: ClipScorer, batch_size: int, accelerator: Accelerator, desc: str
) -> Tensor:
    """The score of every image against its own prompt's features, float32 [B]."""

    def rate(indices: list[int]) -> Tensor:
        return scorer.score(images_B3HW[indices], text_BD[indices])

    return map_batches(rate, len(images_B3HW), batch_size, accelerator, desc)


def write_pictures(images: Mapping[str, Tensor], prompts: PromptSet, count: int, folder: Path) -> None:
    """The first `count` images of every model as FOLDER/<model>/000.png, …, and their prompts."""
    write_json(folder / "prompts.json", list(prompts.prompts[:count]))
    for name, images_B3HW in images.items():
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images_B3HW[:count]):
            to_pil_image(image).save(folder / name / f"{i:03d}.png")
