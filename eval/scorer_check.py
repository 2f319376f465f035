"""Whether a scorer can evaluate the data: their own images with their own captions, beside the same captions shuffled.

To a scorer that does not know such images both are alike, whatever a model is trained to: the teacher's score is
chance, and blocks are removed by noise. So this is measured before anything is trained, in seconds, and a run stops
where it is so (eval/pages/cautions.py has the criterion).
The same is asked of the teacher's images and the prompts that they were drawn from.

Axes: N images, R shuffles, D feature width.
"""

import json
import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor

from slimstep.data.pixels import shown
from slimstep.data.prompts import PromptSet
from slimstep.data.streams import at_random_access, readable
from slimstep.engine.components import component
from slimstep.engine.files import write_json
from slimstep.engine.identity import SCORER_CHECK
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import FINISHED, Run
from slimstep.eval.config import Config
from slimstep.eval.metrics.clip import BATCH, WITHOUT_SCORER, ClipScorer
from slimstep.eval.metrics.compare import mean_and_error
from slimstep.eval.metrics.video import features_of
from slimstep.eval.overlap import plain
from slimstep.eval.pages.cautions import data_sentence, is_above_chance, sentence, teacher_sentence

IMAGES, SHUFFLES = 256, 8
FEWEST_CAPTIONS = 8  # with fewer, Student's t asks for so much that a scorer that knows the data fails by chance
log = logging.getLogger("slimstep")


# ---- the measure ----


def shuffles(texts: Sequence[str], count: int = SHUFFLES) -> tuple[list[int], list[list[int]]]:
    """Indices of the texts, and up to `count` permutations of them that put another text into every place.

    Texts that differ in case and spaces alone are equal. Of one that more than half have, as many are left out as it
    takes; where all are equal nothing is left.
    """
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(plain(text), []).append(index)
    most = max(groups, key=lambda text: len(groups[text]))
    groups[most] = groups[most][: len(texts) - len(groups[most])]
    order, longest = [index for group in groups.values() for index in group], len(groups[most])
    # Equal texts lie side by side: a turn by at least as many as there are of any meets none of them.
    turns = sorted({round(turn) for turn in torch.linspace(longest, len(order) - longest, count).tolist()})
    return order, [order[turn:] + order[:turn] for turn in turns] if order else []


def against_shuffled(image_ND: Tensor, text_ND: Tensor, texts: Sequence[str], scorer: ClipScorer) -> dict | None:
    """Scores of images with their own texts and with shuffled ones, paired; features are unit ones, row by row.

    None where all texts are equal. Raises ValueError for scores that are not finite.
    """
    order, others = shuffles(texts)
    if not others:
        return None
    own_N = scorer.similarity(image_ND[order], text_ND[order])
    wrong_RN = torch.stack([scorer.similarity(image_ND[order], text_ND[other]) for other in others])
    if not (own_N.isfinite().all() and wrong_RN.isfinite().all()):
        raise ValueError(f"the scorer {scorer.protocol['model']} gives scores that are not finite: choose another")
    prefer_RN = (own_N > wrong_RN).float() + 0.5 * (own_N == wrong_RN).float()
    captions = PromptSet(tuple(plain(texts[index]) for index in order), "captions")
    columns = {"own": own_N, "shuffled": wrong_RN.mean(0), "difference": own_N - wrong_RN.mean(0)}
    means = {name: mean_and_error(captions.by_text(column).tolist()) for name, column in columns.items()}
    return {
        "images": len(order),
        **{name: {"mean": m.mean, "se": m.se, "n": m.n} for name, m in means.items()},
        "prefer_own": captions.by_text(prefer_RN.mean(0)).mean().item(),
    }


# ---- the data ----


def check_scorer(config: Config, run: Run, scorer: ClipScorer | None, has_images: bool = True) -> None:
    """Measures, or reads in scorer_check.json, whether the scorer can evaluate the data of a job that begins.

    Raises ValueError where it cannot and scorer.force is not set, or where there is none. A finished run is not looked
    at again.
    """
    if run.made(FINISHED):
        return
    if scorer is None:
        raise ValueError(WITHOUT_SCORER)
    pairs = OmegaConf.to_container(config.data.pairs, resolve=True)
    measured_on = json.loads(json.dumps({"scorer": scorer.protocol, "pairs": pairs}))
    record = run.load(SCORER_CHECK) if run.made(SCORER_CHECK) else {}
    new = any(record.get(key) != value for key, value in measured_on.items())
    if new:
        outcome = measured(config, run, scorer) if has_images else unchecked(prompts_alone(config))
        record = run.agreed({**measured_on, **outcome})
    doubt = data_sentence(record)
    if doubt and "unchecked" not in record and not scorer.force:
        way = "choose one that knows them, as scorer=openclip scorer.model=ViT-g-14 scorer.pretrained=laion2b_s34b_b88k"
        raise ValueError(f"{doubt}: {way}; scorer.force=true goes on with this one")
    if new and run.accelerator.is_main_process:
        write_json(run.path / SCORER_CHECK, record)
    run.accelerator.wait_for_everyone()
    if doubt:
        log.warning(doubt)
    elif new:
        log.info(
            f"the scorer knows these data: {sentence(record, 'captions')}" if "own" in record else record["unchecked"]
        )


def measured(config: Config, run: Run, scorer: ClipScorer) -> dict[str, Any]:
    """What scorer_check.json says of the scorer and the first of the data's images, held-out ones before others."""
    images, captions = own_images(config, IMAGES)
    if not images:
        unknown = "whether the scorer can evaluate these data is not known: none of their images can be read"
        return unchecked(unknown, True)
    images_N3HW = torch.stack(images)
    rate = lambda indices: features_of(scorer, images_N3HW[indices]).float()  # noqa: E731
    image_ND = map_batches(rate, len(images), BATCH, run.accelerator, "images as the scorer sees them")
    record = against_shuffled(image_ND, scorer.text(captions).float().cpu(), captions, scorer)
    same = f"whether the scorer can evaluate these data is not known: all {len(images)} images have one caption"
    if record is None:
        return unchecked(same, True)
    if (count := record["difference"]["n"]) < FEWEST_CAPTIONS and not is_above_chance(record):
        few = f"{sentence(record, 'captions')}; of fewer than {FEWEST_CAPTIONS} captions nothing can be said"
        return unchecked(f"whether the scorer can evaluate these data is not known from {count} captions: {few}", True)
    return record


def unchecked(why: str, is_doubtful: bool = False) -> dict[str, Any]:
    """A record of no measurement; a doubtful one stands on every page."""
    return {"unchecked": why, "doubtful": is_doubtful}


def prompts_alone(config: Config) -> str:
    file = config.data.prompt_file
    return f"whether the scorer can evaluate them is not known before images are drawn: {file} has prompts alone"


def own_images(config: Config, count: int) -> tuple[list[Tensor], list[str]]:
    """Up to `count` images of the data, uint8 [3, H, W], or videos [F, H, W, 3], and their captions, in a fixed
    shuffled order."""
    images: list[Tensor] = []
    captions: list[str] = []
    for split in ("heldout", "train"):
        if len(images) == count:
            break
        chosen = OmegaConf.merge(config, {"data": {"pairs": {"split": split}}})
        try:
            pairs = at_random_access(component(chosen, "data.pairs"), count - len(images))
        except ValueError:  # the split is empty: none is held out where prompts are a file's, or all are
            if split == "train" and not images:
                raise
            continue
        # Those that cannot be read are counted and reported where all are encoded.
        for sample in islice(readable(pairs, "scorer check", tell=False), count - len(images)):
            images.append(shown(sample))
            captions.append(sample["caption"])
    return images, captions


# ---- the teacher ----


def compare_teacher(
    features: Callable[[list[int]], Tensor], prompts: PromptSet, scorer: ClipScorer, accelerator: Accelerator
) -> dict | None:
    """The scores of the teacher's first images, of which `features(indices)` gives the scorer's, with their own prompts
    and with shuffled ones; logged at chance."""
    texts = prompts.prompts[:IMAGES]
    image_ND = map_batches(features, len(texts), BATCH, accelerator, "the teacher's images as the scorer sees them")
    record = against_shuffled(image_ND.float(), scorer.text(texts).float().cpu(), texts, scorer)
    if sentence := teacher_sentence(record):
        log.warning(sentence)
    return record
