"""What a run's numbers leave in doubt, in sentences that stand at the head of its pages: read from the run's own files.

A scorer that cannot evaluate the data and was forced to go on, a teacher at chance, block scores that are noise. Images
are above chance with their texts where neither is so:

- The difference to shuffled texts is within its error: below the 99 % point of Student's t. Errors count distinct
  texts, not images, for images of one text are alike: of ten digits, 256 images give differences of 4.8 errors that
  count images by chance alone, and of 1.1 that count captions.
- Fewer than two of three images score higher with their own text than with another's; chance is one of two. Such a
  difference may be real, and is too small: all that CLIP score can lose is then 0.43 standard deviations of an image,
  which 64 prompts tell from nothing, but not from its half.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scipy import stats

from slimstep.engine.identity import SCORER_CHECK
from slimstep.eval.pages.runs import ranked_by, read_json
from slimstep.eval.record import read_evaluation

Record = Mapping[str, Any]
CONFIDENCE, LEAST_SHARE = 0.99, 2 / 3
LEAST_AGREEMENT = 0.5
# Of the squared error of an unrelated image: 30 dB nearer, which nobody sees. Of such a block CLIP score has nothing to
# say, and being within its error is as it should be.
UNCHANGED = 1e-3
MORE = "more scoring.prompts, another scorer, or a longer training of the teacher"


def cautions(folder: str | Path) -> list[str]:
    """The sentences about a run, the most serious first; none for a run whose files do not speak of it."""
    return list(filter(None, sentences_of(Path(folder))))


def cautions_of(folders: Mapping[str, str | Path]) -> list[str]:
    """The sentences about several runs by name; what several say is said once, with their names."""
    names: dict[str, list[str]] = {}
    for name, folder in folders.items():
        for sentence in cautions(folder):
            names.setdefault(sentence, []).append(name)
    return [f"{', '.join(runs)}: {sentence}" for sentence, runs in names.items()]


def sentences_of(folder: Path) -> Iterator[str]:
    if record := read_json(folder / SCORER_CHECK):
        yield data_sentence(record)
    points = evaluation.points if (evaluation := read_evaluation(folder)) else ()
    yield from dict.fromkeys(teacher_sentence(point.facts.get("against_shuffled")) for point in points)
    for path in sorted(folder.glob("round-*/scores.json")):
        yield from (f"{path.parent.name}: {sentence}" for sentence in score_cautions(read_json(path)))


def score_cautions(scores: Mapping[str, Any]) -> list[str]:
    """What is in doubt about a round's block scores: a ranking of the prompts, and losses that are within their error.

    By chance two thirds of all losses are within one standard error. A race says itself how far it is from settled.
    """
    if race := scores.get("race"):
        regret = race["looks"][-1]["regret"]
        ended = f"the race of the blocks ended with an expected regret of {regret:.2f}, above {race['tolerance']:g}"
        return [f"{ended}: take more scoring.race_prompts"] if regret > race["tolerance"] else []
    lines, agreement = [], scores["rank_agreement_of_halves"]
    if not agreement >= LEAST_AGREEMENT:
        half = f"two halves of the prompts rank the blocks alike with ρ = {agreement:.2f} only, below {LEAST_AGREEMENT}"
        lines.append(f"{half}: the ranking is noise; {MORE}")
    changes = lambda block: (error := block.get("picture_error")) is None or error >= UNCHANGED  # noqa: E731
    seen = list(filter(changes, scores["sites"].values()))
    within = [block for block in seen if abs(block["delta_clip"]) <= block["se"]]
    if len(within) > len(seen) / 2:
        blocks = f"of {len(within)} of the {len(seen)} blocks whose removal changes the images"
        within_error = f"{ranked_by(scores)} lost is within its error {blocks}"
        lines.append(f"{within_error}: what is removed is left to chance; {MORE}")
    return lines


def is_above_chance(record: Record) -> bool:
    """Whether own texts score higher than shuffled ones, beyond the error and for two of three images."""
    difference = record["difference"]
    error = stats.t.ppf(CONFIDENCE, difference["n"] - 1) * difference["se"]
    return bool(difference["mean"] > error and record["prefer_own"] >= LEAST_SHARE)


def sentence(record: Record, texts: str) -> str:
    own, shuffled, difference = record["own"], record["shuffled"], record["difference"]
    return (
        f"{record['images']} images score {own['mean']:.2f} with their own {texts} and {shuffled['mean']:.2f} with "
        f"shuffled ones (difference {difference['mean']:+.2f} ± {difference['se']:.2f} over {difference['n']} "
        f"{texts}), and {record['prefer_own']:.0%} prefer their own"
    )


def data_sentence(record: Record) -> str:
    """What scorer_check.json leaves in doubt; empty where the scorer can evaluate the data."""
    if "unchecked" in record:
        return record["unchecked"] if record["doubtful"] else ""
    if is_above_chance(record):
        return ""
    return f"the scorer {record['scorer']['model']} cannot evaluate these data: {sentence(record, 'captions')}"


def teacher_sentence(record: Record | None) -> str:
    """What is wrong with a teacher at chance, and the way out; empty where it is above it."""
    if record is None or is_above_chance(record):
        return ""
    way = "more eval.prompts, another scorer, or a teacher that knows such prompts (a longer training of it)"
    return f"the teacher is at chance: {sentence(record, 'prompts')}; nothing can be lost against it: {way}"
