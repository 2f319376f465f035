"""Block scores: the CLIP score lost when one block is skipped, paired by prompt and noise (SnapFusion, section 3.1), or
when one of its parts is narrower.

Different ablations share a batch through block masks; the base is sampled once. An item's number says which prompt
and which block it is, and batches are cut by item number, so any number of processes gives the same scores.

A second measure stands beside the score: how far the images are from the base's, in units of how far images of two
prompts are from each other. A scorer that is at chance loses nothing when a picture is destroyed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from slimstep.prune.changes import Change, changed


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
        `picture_error` is `picture_error`'s, null where that is not known. Narrowings stand apart, by their labels."""
        base = mean_and_error(self.base_P.tolist())
        rows = {
            label: block_record(loss_P.tolist(), psnr_P.mean().item(), self.others_psnr)
            for label, loss_P, psnr_P in zip(self.blocks, self.loss_NP, self.psnr_NP, strict=True)
        }
        narrower = {label: row for label, row in rows.items() if Change.of(label).part}
        return {
            "protocol": protocol,
            "base": {"clip": base.mean, "se": base.se, "psnr_to_other_prompts": none_if_nan(self.others_psnr)},
            "rank_agreement_of_halves": split_half_agreement(self.loss_NP.tolist()),
            "sites": {label: row for label, row in rows.items() if label not in narrower},
            **({"narrower": narrower} if narrower else {}),
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
    texts, blocks = prompts.prompts, tuple(blocks or unet.kept_blocks)
    metric = as_metric(metric)
    metric.prepare(texts)

    def draw(indices: list[int]) -> Tensor:
        if latents_PCHW is None:
            return sampler.images(unet, texts, indices)
        ends_BCHW = latents_PCHW[indices]
        return sampler.in_parts(lambda _, rows, __: sampler.decode(ends_BCHW[rows]), unet, len(indices))

    shared = batch_size, accelerator or Accelerator()
    base = map_batches(draw, len(texts), *shared, "images of the base", keep and keep / "base")

    def ablate(items: list[int]) -> Tensor:
        """Shape [items, 2]: CLIP score after the change, and PSNR to the base image."""
        columns, indices = zip(*(divmod(item, len(texts)) for item in items), strict=True)

        def draw(rows: list[int], block_mask_BN: Tensor | None) -> Tensor:
            return sampler.images(unet, texts, [indices[row] for row in rows], block_mask_BN=block_mask_BN).cpu()

        images, rows = changed(unet, [blocks[column] for column in columns], draw), list(indices)
        return torch.stack([metric(images, [texts[i] for i in rows], base[rows]), psnr(images, base[rows])], dim=1)

    rate = lambda rows: metric(base[rows], [texts[i] for i in rows], base[rows])  # noqa: E731
    base_P = map_batches(rate, len(texts), *shared, "the base")
    items, parts = len(blocks) * len(texts), keep and keep / "blocks"
    values = map_batches(ablate, items, *shared, "block scores", parts)
    score_NP, psnr_NP = values.reshape(len(blocks), len(texts), 2).unbind(-1)
    lost_NP = base_P - score_NP if metric.better == "high" else score_NP - base_P
    losses = prompts.by_text(base_P), prompts.by_text(lost_NP)
    return ScoreTable(blocks, *losses, prompts.by_text(psnr_NP), psnr_of_others(base, texts))


def psnr_of_others(images_P3HW: Tensor, texts: Sequence[str]) -> float:
    """The mean PSNR in dB of images to those of other texts; nan where all texts are equal."""
    order, others = shuffles(texts, count=1)
    return psnr(images_P3HW[order], images_P3HW[others[0]]).mean().item() if others else math.nan
