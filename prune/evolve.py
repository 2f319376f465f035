"""Algorithm 1's decision (SnapFusion, section 3.1): which blocks to remove or copy, from scores and milliseconds.

Rules where the paper is silent:
- CLIP lost ≤ 0 (removal does no harm): the block is free. Free blocks go first, the most milliseconds first.
- A block whose removal destroys the picture is not free, whatever CLIP score says. Destroyed: the squared error to the
  unpruned images is a twentieth or more of that between images of different prompts (`DESTROYED`). On the bundled model
  such removals lose 10 to 63 CLIP, of 83, and the others 14 at most. Where CLIP lost is all the same within two
  standard errors of zero, or below it, the scorer does not see what the picture shows: the block is priced as the
  dearest removal that keeps more of the picture, and at its own CLIP lost plus two errors at the least. A clear loss
  stands as it is: a scorer that knows the data decides alone, and where it knows nothing, what destroys the picture
  goes last.
- scores.json of older runs does not say how far images of different prompts are apart: there CLIP score decides alone.
- Milliseconds saved ≤ 0 (removal saves no time): the block is never removed for latency, nor copied to use room.
- Ties: the earlier block in order of execution.
- A block that holds, or lies within, one already chosen in this round waits for the next round's measurements; and so
  do other changes of a part that is changed in it, and the removal of its block.

Narrowing a part of a block, another dtype and merged tokens (changes.py) are actions as removals are, and are ranked
with them.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from slimstep.eval.pages.text import decimals, fixed
from slimstep.models.architecture import Architecture, repeat, without_defaults
from slimstep.prune.changes import Change

DESTROYED, CLEAR = 0.05, 2.0  # of an unrelated picture's squared error; standard errors of CLIP lost
IN_FILES = {"block": "site", "repeats": "depth"}  # as decision.json has called them from the first version on


@dataclass(frozen=True)
class BlockValue:
    """What a block gives and costs: the CLIP score its removal loses, and the milliseconds it saves; or, with a `part`
    and its `share`, those of another change (changes.py).

    `picture_error` is that of prune/scores.py, nan where it was not measured; `floor` the least CLIP score that the
    removal is taken to lose; `screen_error` that of prune/screening.py, nan without a screen. A block that runs more
    than once is removed with all its copies. With another `search.metric` all values are of that one, `metric`.
    `at_once`: where `delta_clip` was measured after local recovery (local_recovery.py), what was lost before; else nan.
    """

    block: str
    delta_clip: float
    se: float
    saved_ms: float
    repeats: int = 1
    picture_error: float = math.nan
    floor: float = -math.inf
    screen_error: float = math.nan
    metric: str = "CLIP"
    part: str | None = None
    share: float | str = 0.0
    at_once: float = math.nan

    @property
    def change(self) -> Change:
        return Change(self.block, self.part, self.share)

    @property
    def copy_ms(self) -> float:
        """What one more copy costs."""
        return self.saved_ms / self.repeats

    @property
    def clip_per_ms(self) -> float:
        """CLIP lost per millisecond saved; +inf where removal saves nothing."""
        return self.delta_clip / self.saved_ms if self.saved_ms > 0 else math.inf

    @property
    def is_contradicted(self) -> bool:
        """Whether the picture is destroyed and CLIP score does not clearly say so."""
        return self.picture_error >= DESTROYED and self.delta_clip <= CLEAR * self.se

    @property
    def price(self) -> float:
        """The CLIP score that its removal is taken to lose."""
        return max(self.delta_clip, self.floor)

    @property
    def removal_order(self) -> tuple[float, float]:
        """Sorts the worst bargains first; blocks that were screened out go last, in the order of the screen."""
        if math.isnan(self.delta_clip) and not math.isnan(self.screen_error):
            return 2, self.screen_error / self.saved_ms if self.saved_ms > 0 else math.inf
        if self.price <= 0 and self.saved_ms > 0 and not self.is_contradicted:
            return 0, -self.saved_ms
        return 1, self.price / self.saved_ms if self.saved_ms > 0 else math.inf

    @property
    def reason(self) -> str:
        if math.isnan(self.delta_clip):
            out = "" if math.isnan(self.screen_error) else f", screened out at an error of {self.screen_error:.1%}"
            return f"not scored{out}; {self.saved_ms:.2f} ms"
        shown = decimals(self.se)
        recovered = "" if math.isnan(self.at_once) else f" after local recovery, {self.at_once:+.{shown}f} before"
        lost = f"{self.metric} lost {self.delta_clip:+.{shown}f} ± {fixed(self.se)}{recovered}"
        lost = f"{lost}, saves {self.saved_ms:.2f} ms"
        if self.is_contradicted:
            destroyed = f"its picture's error is {self.picture_error:.0%} of an unrelated one's"
            return f"{lost}; {destroyed}: taken to lose {self.price:.{shown}f}"
        if self.delta_clip <= 0:
            return f"free: {lost}"
        return f"{self.clip_per_ms:.{shown}f} {self.metric} lost per ms: {lost}"


@dataclass(frozen=True)
class Action:
    """One change of the architecture, a copy or one of changes.py, and the latency predicted after it; nan where it was
    not scored or timed."""

    action: str
    block: str
    delta_clip: float
    se: float
    saved_ms: float
    value: float
    why: str
    predicted_ms: float
    part: str | None = None
    share: float | str = 0.0

    @property
    def change(self) -> Change:
        """What an action that is no copy does."""
        return Change(self.block, self.part, self.share)


def record_json(record: BlockValue | Action) -> dict:
    """Its fields by their names in files, null for what was not scored or timed; the metric is in scores.json, and a
    whole block has no part; nor is there a loss at once where nothing was recovered."""
    left_out = {"metric"} if record.part else {"metric", "part", "share"}
    left_out |= {"at_once"} if math.isnan(getattr(record, "at_once", math.nan)) else set()
    fields = {IN_FILES.get(name, name): x for name, x in asdict(record).items() if name not in left_out}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in fields.items()}


def choose_removals(
    values: Iterable[BlockValue], latency_ms: float, target_ms: float, at_most: int | None = None
) -> list[Action]:
    """The cheapest blocks, worst bargain first, until the predicted latency meets the target or `at_most` are taken."""
    return take_in_order(sorted(priced(values), key=lambda v: v.removal_order), latency_ms, target_ms, at_most)


def priced(values: Iterable[BlockValue]) -> list[BlockValue]:
    """The values, in their order, with a floor where the picture contradicts CLIP score: a removal that keeps less of
    the picture loses no less than the dearest of those that keep more."""
    values = list(values)

    def floor(value: BlockValue) -> float:
        gentler = [other.delta_clip for other in values if other.picture_error < value.picture_error]
        return max([value.delta_clip + CLEAR * value.se, *gentler])

    return [replace(value, floor=floor(value)) if value.is_contradicted else value for value in values]


def take_in_order(
    values: Iterable[BlockValue], latency_ms: float, target_ms: float, at_most: int | None = None
) -> list[Action]:
    """Removes or changes blocks in the order given, those that save time, until the predicted latency meets the
    target."""
    chosen: list[Action] = []
    for value in values:
        if latency_ms <= target_ms or len(chosen) == at_most:
            break
        if value.saved_ms <= 0 or any(value.change.excludes(action.change) for action in chosen):
            continue
        chosen.append(saving(value, latency_ms))
        latency_ms = chosen[-1].predicted_ms
    return chosen


def choose_copies(
    values: Iterable[BlockValue],
    latency_ms: float,
    target_ms: float,
    copyable: Iterable[str],
    at_most: int = 1,
) -> list[Action]:
    """The most valuable blocks whose copies fit under the target, best first; blocks without value are never copied."""
    copyable = set(copyable)
    chosen: list[Action] = []
    for value in sorted(values, key=lambda v: -v.clip_per_ms):
        fits = value.saved_ms > 0 and latency_ms + value.copy_ms <= target_ms
        if len(chosen) == at_most or value.delta_clip <= 0:
            break
        can_be_copied = value.part is None and value.block in copyable
        if fits and can_be_copied and not any(value.change.excludes(action.change) for action in chosen):
            chosen.append(copy(value, latency_ms))
            latency_ms = chosen[-1].predicted_ms
    return chosen


def saving(value: BlockValue, latency_ms: float) -> Action:
    """The value's change of a network of `latency_ms`."""
    return _action(value.change.action, value, value.saved_ms, latency_ms)


def copy(value: BlockValue, latency_ms: float) -> Action:
    """Running the block once more in a network of `latency_ms`."""
    return _action("copy", value, -value.copy_ms, latency_ms)


def _action(name: str, value: BlockValue, saved_ms: float, latency_ms: float) -> Action:
    numbers = value.delta_clip, value.se, saved_ms, value.clip_per_ms
    return Action(name, value.block, *numbers, value.reason, latency_ms - saved_ms, value.part, value.share)


def round_target_ms(latency_ms: float, target_ms: float, round_index: int, rounds: int) -> float:
    """An equal share of the remaining excess for each remaining round; the target itself in the last."""
    return latency_ms - (latency_ms - target_ms) / (rounds - round_index)


def apply(architecture: Architecture, actions: Iterable[Action]) -> Architecture:
    """The architecture after the actions; entries of whole blocks are left out."""
    for action in actions:
        copied = action.action == "copy"
        architecture = repeat(architecture, action.block) if copied else action.change.applied_to(architecture)
    return without_defaults(architecture)
