"""Block scores: the CLIP score lost when one block is skipped, paired by prompt and noise (SnapFusion, section 3.1), or
when one of its parts is narrower.

Different ablations share a batch through block masks; the base is sampled once. An item's number says which prompt
and which block it is, and batches are cut by item number, so any number of processes gives the same scores.

A second measure stands beside the score: how far the images are from the base's, in units of how far images of two
prompts are from each other. A scorer that is at chance loses nothing when a picture is destroyed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from slimstep.data.prompts import PromptSet
from slimstep.engine.parallel import map_batches
from slimstep.eval.metrics.clip import CLOSEST_MSE, ClipScorer, psnr
from slimstep.eval.metrics.compare import mean_and_error, split_half_agreement
from slimstep.eval.metrics.metric import Metric, as_metric
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import shuffles
from slimstep.models.families.prunable import Prunable
from slimstep.prune.changed import Labels, changed
from slimstep.prune.changes import Change


@dataclass(frozen=True)
class ScoreTable:
    """Paired losses on the prompts: `loss_NP[n, p]` is base CLIP − CLIP after change n, for prompt p. `blocks` are the
    labels of the changes (changes.py): a removal's is its block.

    A prompt drawn several times counts once, with its mean. `others_psnr` is that of base images to those of other
    prompts, in dB; nan where there is one prompt.
    """

    blocks: tuple[str, ...]
    base_P: Tensor
    loss_NP: Tensor
    psnr_NP: Tensor
    others_psnr: float = math.nan

    def record(self, protocol: dict) -> dict:
        """The table as JSON: per block the mean paired loss, its standard error, and the images' PSNR to the base's;
        `picture_error` is `picture_error`'s, null where that is not known."""
        rows = {
            label: block_record(loss_P.tolist(), psnr_P.mean().item(), self.others_psnr)
            for label, loss_P, psnr_P in zip(self.blocks, self.loss_NP, self.psnr_NP, strict=True)
        }
        agreement = split_half_agreement(self.loss_NP.tolist())
        return score_record(protocol, self.base_P, rows, self.others_psnr, agreement)


def score_record(
    protocol: Mapping[str, Any], base_P: Tensor, rows: Mapping[str, dict], others_psnr: float,
    agreement: float | None, **more: Any,
) -> dict:  # fmt: skip
    """What scores.json holds, from the rows of all changes by their labels. Narrowings stand apart, by these."""
    base = mean_and_error(base_P.tolist())
    narrower = {label: row for label, row in rows.items() if Change.of(label).part}
    return {
        "protocol": dict(protocol),
        "base": {"clip": base.mean, "se": base.se, "psnr_to_other_prompts": none_if_nan(others_psnr)},
        "rank_agreement_of_halves": agreement,
        "sites": {label: row for label, row in rows.items() if label not in narrower},
        **({"narrower": narrower} if narrower else {}),
        **more,
    }


def block_record(loss_P: list[float], mean_psnr: float, others_psnr: float) -> dict:
    loss, error = mean_and_error(loss_P), none_if_nan(picture_error(mean_psnr, others_psnr))
    table = {"delta_clip": loss.mean, "se": loss.se, "n": loss.n, "psnr": mean_psnr, "picture_error": error}
    return {**table, "per_prompt": loss_P}


def picture_error(mean_psnr: float, others_psnr: float) -> float:
    """The squared error of images to the base's, in units of that between base images of different prompts.

    0 for equal images and 1 for unrelated ones; rounding to 8 bits is taken off. nan where `others_psnr` is nan.
    """
    error, others = (255**2 / 10 ** (decibels / 10) for decibels in (mean_psnr, others_psnr))
    return max(0.0, error - CLOSEST_MSE) / others


def none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def score_blocks(
    unet: Prunable,
    sampler: Sampler,
    metric: Metric | ClipScorer,
    prompts: PromptSet,
    batch_size: int,
    accelerator: Accelerator | None = None,
    keep: Path | None = None,
    blocks: Sequence[str] | None = None,
    latents_PCHW: Tensor | None = None,
) -> ScoreTable:
    """The removal of every block, or the changes whose labels are `blocks`, on every prompt by a metric of single
    images, or of their distance to the base's.

    (1 + changes) · prompts images. `batch_size` counts images. `latents_PCHW` are the base's, where they are known.

    Finished batches lie under `keep` until all are there.
    """
    blocks = tuple(blocks or unet.kept_blocks)
    drawing = Drawing(unet, sampler, as_metric(metric), prompts, batch_size, accelerator or Accelerator(), latents_PCHW)
    every = range(len(prompts))
    base_P = drawing.base(every, keep and keep / "base")
    pairs = [(block, index) for block in blocks for index in every]
    values_NP2 = drawing.changes(pairs, keep and keep / "blocks").reshape(len(blocks), len(prompts), 2)
    lost_NP, psnr_NP = (prompts.by_text(values_NP) for values_NP in values_NP2.unbind(-1))
    return ScoreTable(blocks, prompts.by_text(base_P), lost_NP, psnr_NP, drawing.others_psnr)


class Drawing:
    """Images of a network, and of the network after changes: values of a metric of single images, and distances.

    `batch_size` counts images. `latents_PCHW`: where the network's own sampling ends, where that is known.
    """

    def __init__(
        self, unet: Prunable, sampler: Sampler, metric: Metric, prompts: PromptSet, batch_size: int,
        accelerator: Accelerator, latents_PCHW: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.unet, self.sampler, self.metric, self.texts = unet, sampler, metric, prompts.prompts
        self.shared = batch_size, accelerator
        self.latents_PCHW = latents_PCHW
        self.images: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        metric.prepare(self.texts)

    def base(self, prompts: Sequence[int], keep: Path | None = None) -> Tensor:
        """The network's own values [P] on prompts, by their numbers in the set; those not seen yet are drawn."""
        if new := [number for number in prompts if number not in self.images]:
            draw = lambda rows: self.draw_base([new[row] for row in rows])  # noqa: E731
            images = map_batches(draw, len(new), *self.shared, "images of the base", keep)
            self.images |= zip(new, images, strict=True)
            rate = lambda rows: self.rate(images[rows], [new[row] for row in rows])  # noqa: E731
            self.values |= zip(new, map_batches(rate, len(new), *self.shared, "the base"), strict=True)
        return torch.stack([self.values[number] for number in prompts])

    def draw_base(self, numbers: list[int]) -> Tensor:
        if self.latents_PCHW is None:
            return self.sampler.images(self.unet, self.texts, numbers)
        ends_BCHW = self.latents_PCHW[numbers]
        return self.sampler.in_parts(lambda _, rows, __: self.sampler.decode(ends_BCHW[rows]), self.unet, len(numbers))

    def rate(self, images_B3HW: Tensor, numbers: Sequence[int]) -> Tensor:
        return self.metric(images_B3HW, [self.texts[n] for n in numbers], self.images_of(numbers))

    def images_of(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self.images[number] for number in numbers])

    def changes(self, pairs: Sequence[tuple[Labels, int]], keep: Path | None = None) -> Tensor:
        """[pairs, 2] for changes by their labels, one or several at once, and prompts by their numbers, whose base is
        drawn: what is lost against the base, in the metric's units, and PSNR to its image in dB."""

        def ablate(items: list[int]) -> Tensor:
            labels, numbers = zip(*(pairs[item] for item in items), strict=True)

            def draw(rows: list[int], block_mask_BN: Tensor | None) -> Tensor:
                own = [numbers[row] for row in rows]
                return self.sampler.images(self.unet, self.texts, own, block_mask_BN=block_mask_BN).cpu()

            return self.values_of(changed(self.unet, labels, draw), numbers)

        values_B2 = map_batches(ablate, len(pairs), *self.shared, "block scores", keep)
        return self.lost(values_B2, [number for _, number in pairs])

    def values_of(self, images_B3HW: Tensor, numbers: Sequence[int]) -> Tensor:
        """[B, 2]: the metric of images of prompts, by their numbers, whose base is drawn, and PSNR to it in dB."""
        return torch.stack([self.rate(images_B3HW, numbers), psnr(images_B3HW, self.images_of(numbers))], dim=1)

    def lost(self, values_B2: Tensor, numbers: Sequence[int]) -> Tensor:
        """The same with what is lost against the base in the place of the metric."""
        base_B = self.base(numbers)
        lost_B = base_B - values_B2[:, 0] if self.metric.better == "high" else values_B2[:, 0] - base_B
        return torch.stack([lost_B, values_B2[:, 1]], dim=1)

    @property
    def others_psnr(self) -> float:
        """PSNR in dB of the base's images to those of other prompts; nan where there is one prompt."""
        numbers = sorted(self.images)
        return psnr_of_others(self.images_of(numbers), [self.texts[number] for number in numbers])


def psnr_of_others(images_P3HW: Tensor, texts: Sequence[str]) -> float:
    """The mean PSNR in dB of images to those of other texts; nan where all texts are equal."""
    order, others = shuffles(texts, count=1)
    return psnr(images_P3HW[order], images_P3HW[others[0]]).mean().item() if others else math.nan
