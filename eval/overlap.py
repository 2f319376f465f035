"""Whether prompts that outcomes are evaluated on were seen before: as captions in training, or as calibration prompts.

Held-out images may have captions that training images have, too: a split is by image, and captions repeat.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from slimstep.data.prompts import PromptSet
from slimstep.data.shards import CachedPairs
from slimstep.engine.files import damaged


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


def read_calibration_prompts(file: Path) -> frozenset[str]:
    """The prompts that prune_unet's prompts.json says blocks were ranked by."""
    with damaged(file):
        record = json.loads(file.read_text())
        # Earlier versions wrote "ranked_on".
        return frozenset(record["calibration_prompts" if "calibration_prompts" in record else "ranked_on"])


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
