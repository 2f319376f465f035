"""Other budgets of a finished pruning run: its block scores and latencies say what would be changed for each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from slimstep.engine.files import load_json
from slimstep.engine.quiet import preview
from slimstep.eval.metrics.compare import Mean, mean_and_error
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import score
from slimstep.models.architecture import Architecture, as_architecture, as_json
from slimstep.prune.evolve import IN_FILES, Action, BlockValue, apply, choose_removals
from slimstep.prune.interactions import Interaction
from slimstep.prune.program import program_removals

SEARCHES = ("snapfusion", "program")


@dataclass(frozen=True)
class Measured:
    """The first round of a finished run: what the teacher's blocks give, prompt by prompt, and cost; and what pairs of
    changes lose beyond the sum, prompt by prompt, where that was measured. `raced`: what changes lose are estimates,
    from few prompts or none."""

    values: tuple[BlockValue, ...]
    lost: Mapping[str, np.ndarray]
    teacher_ms: float
    before: Architecture
    skip_rule: str | dict[str, str] | None
    pairs: Mapping[Interaction, np.ndarray] = field(default_factory=dict)
    raced: bool = False

    @property
    def removals(self) -> tuple[BlockValue, ...]:
        """What removing whole blocks gives, without the other changes."""
        return tuple(value for value in self.values if value.part is None)

    def changed(self, search: str, target_ms: float) -> list[Action]:
        """What a search would change; of sets nothing is measured here, and evolution's answer is the program's."""
        if search == "snapfusion":
            return choose_removals(self.values, self.teacher_ms, target_ms)
        return program_removals(self.values, self.teacher_ms, target_ms, self.pairs)

    def after(self, choice: "Choice") -> dict[str, Any]:
        """The network of a choice as `search=manual` reads it: with the skip rule that its blocks were scored with."""
        return {"after": as_json(apply(self.before, choice.actions)), "bypass": self.skip_rule}


@dataclass(frozen=True)
class Choice:
    """What a search would remove and narrow for a share of the teacher's latency.

    `lost` is the sum of the losses over the prompts, an estimate: as if no change altered what another costs, but for
    the pairs that were measured, and before any recovery. None where nothing is changed.
    """

    fraction: float
    search: str
    actions: Sequence[Action]
    share: float
    lost: Mean | None

    @property
    def is_reached(self) -> bool:
        return self.share <= self.fraction


def read_first_round(run: str | Path) -> Measured:
    """ValueError where the run has scored no blocks."""
    folder = Path(run) / "round-00"
    files = {name: folder / f"{name}.json" for name in ("decision", "scores", "latency")}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise ValueError(f"{', '.join(missing)} is not there: name a run of prune_unet that has scored its blocks")
    decision, scores, latency = (load_json(file) for file in files.values())
    scored = {**scores["sites"], **scores.get("narrower", {})}
    lost = {label: np.asarray(score["per_prompt"]) for label, score in scored.items()}
    values, before = tuple(map(value_of, decision["values"])), as_architecture(decision["before"])
    file = folder / "interactions.json"
    records = [pair for pair in load_json(file)["pairs"] if pair["used"]] if file.is_file() else []
    pairs = {Interaction(tuple(of["changes"]), of["lost"]): np.asarray(of["per_prompt"]) for of in records}
    return Measured(values, lost, latency["full_ms"], before, decision.get("bypass"), pairs, "race" in scores)


def value_of(record: Mapping[str, Any]) -> BlockValue:
    """A block's value as decision.json has it; null was nan, or no floor."""
    named = {field.name: record.get(IN_FILES.get(field.name, field.name)) for field in fields(BlockValue)}
    given = {name: value for name, value in named.items() if value is not None}
    return BlockValue(**{"delta_clip": math.nan, "se": math.nan, **given})


def choices(measured: Measured, fractions: Sequence[float]) -> list[Choice]:
    """By each search, for every share of the latency. ValueError for a share that is none."""
    if bad := [fraction for fraction in fractions if not 0 < fraction < 1]:
        raise ValueError(f"--fractions {', '.join(f'{f:g}' for f in bad)}: each must lie between 0 and 1")
    return [choice(measured, fraction, name) for fraction in fractions for name in SEARCHES]


def choice(measured: Measured, fraction: float, search: str) -> Choice:
    now = measured.teacher_ms
    actions = measured.changed(search, fraction * now)
    share = actions[-1].predicted_ms / now if actions else 1.0
    labels = [action.change.label for action in actions]
    known = [measured.lost[label] for label in labels if label in measured.lost]
    together = {pair: lost_P for pair, lost_P in measured.pairs.items() if set(pair.labels) <= set(labels)}
    lost = sum_of_estimates(actions, known, together) if measured.raced else sum_of([*known, *together.values()])
    return Choice(fraction, search, actions, share, lost)


def sum_of(known: Sequence[np.ndarray]) -> Mean | None:
    """What changes, and pairs of them beyond it, lose together, prompt by prompt."""
    return mean_and_error(np.sum(known, axis=0)) if known else None


def sum_of_estimates(
    actions: Sequence[Action], known: Sequence[np.ndarray], pairs: Mapping[Interaction, np.ndarray]
) -> Mean | None:
    """The same of a race, in which changes are drawn for different prompts, or for none. n: the fewest of a change."""
    beyond = [mean_and_error(lost_P.tolist()) for lost_P in pairs.values()]
    error = math.hypot(*(action.se for action in actions), *(mean.se for mean in beyond))
    lost = sum(action.delta_clip for action in actions) + sum(mean.mean for mean in beyond)
    return Mean(lost, error, min(map(len, known))) if actions else None


FRONT = tuple(k / 20 for k in range(19, 7, -1))  # 95 to 40 %


def front(run: str | Path) -> list[dict[str, Any]]:
    """What the report draws of other budgets: predicted shares of the latency and losses, by each search. A budget that
    all changes together do not reach is left out."""
    reached = (choice for choice in choices(read_first_round(run), FRONT) if choice.is_reached)
    return [{"search": choice.search, "fraction": choice.fraction, "share": choice.share,
             "changes": [action.change.label for action in choice.actions],
             "lost": choice.lost and vars(choice.lost)} for choice in reached]  # fmt: skip


def budgets_table(found: Sequence[Choice]) -> Table:
    return Table.of({
        "budget": lambda choice: f"{choice.fraction:.0%}",
        "search": lambda choice: choice.search,
        "predicted": lambda choice: f"{choice.share:.1%}{'' if choice.is_reached else ' (not reached)'}",
        "blocks changed": lambda choice: str(len({action.block for action in choice.actions})),
        "sum of what they lose ± se": lambda choice: score(choice.lost and vars(choice.lost)),
        "only by this search": lambda choice: preview(sorted(own(choice, found))) or "–",
    }, found, labels=2)  # fmt: skip


def own(choice: Choice, found: Sequence[Choice]) -> set[str]:
    """The changes that no other search makes for this budget."""
    others = [other for other in found if other.fraction == choice.fraction and other is not choice]
    taken = {action.change.label for other in others for action in other.actions}
    return {action.change.label for action in choice.actions} - taken
