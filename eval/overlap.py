"""Whether prompts that outcomes are evaluated on were seen before: as captions in training, or as calibration prompts.

Held-out images may have captions that training images have, too: a split is by image, and captions repeat.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.prompts import PromptSet
from data.shards import CachedPairs

# {key of evaluation.json, the number of such prompts: what they were seen as}
SEEN = {
    "prompts_in_training": "captions that were trained on",
    "prompts_in_calibration": "prompts that blocks were ranked on",
    "prompts_in_training_split": "captions of the data's training images",
}


def among(prompts: PromptSet, texts: Iterable[str]) -> list[str]:
    """The distinct prompts that are among the texts, but for case and spaces, which CLIP's tokenizer does not see."""
    left = {plain(prompt): prompt for prompt in prompts.distinct}
    seen = set()
    for text in texts:
        if (same := plain(text)) in left:
            seen.add(same)
            if len(seen) == len(left):
                break
    return [prompt for same, prompt in left.items() if same in seen]


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def known_captions(pairs, caches: Path) -> Iterable[str] | None:
    """The captions of pairs without their images: of a stream those of a finished cache, None where there is none."""
    if hasattr(pairs, "caption"):
        return map(pairs.caption, range(len(pairs)))
    for index in sorted(caches.glob("*/index.json")):
        if json.loads(index.read_text())["made_from"].get("pairs") == pairs.fingerprint:
            return CachedPairs(index.parent).distinct_captions()
    return None


def overlap_sentence(evaluation: Mapping[str, Any]) -> str:
    """What an evaluation says of its prompts; empty where it says nothing, as those of older runs."""
    n, known = evaluation["n"], {what: evaluation[key] for key, what in SEEN.items() if evaluation.get(key) is not None}
    if not known:
        return ""
    if not any(known.values()):
        return f"None of the {n} prompts is among the {' or the '.join(known)}."
    told = "; ".join(f"{count} of the {n} prompts are among the {what}" for what, count in known.items())
    return f"{told}: the scores say less of new prompts."
