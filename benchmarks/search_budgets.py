"""Is the integer program over all changes better than greedy removal, budget by budget, after the same recovery?

    python train.py +experiment=prune_unet name=mixed search.rounds=1 'search.actions=[remove,narrow]' \\
        search.skip_rule=drop_skip train.steps=200 train.batch_size=64
    python benchmarks/search_budgets.py --run runs/mixed --root runs/budgets                       # some hours

For each of --fractions of the teacher's latency two networks are cut from the weights and by the scores and latencies
of --run's first round: by SnapFusion's greedy ratio over removals of whole blocks, and by the integer program over all
changes that were scored. Both are recovered by the same training and evaluated on the same prompts, which nothing was
chosen on. To --out go table.md and results.json with the paired differences. Killed, it continues; several processes
may share the networks by --lane 0/2, 1/2, and one without it gathers what they have made.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.search_truth import AFTER, RIGHT_AFTER, add_recovery, point, recovered
from slimstep.engine.console import open_console
from slimstep.engine.files import write_json, write_text
from slimstep.eval.metrics.compare import PairedDifference, paired_difference
from slimstep.eval.pages.tables import Table
from slimstep.eval.record import Evaluation
from slimstep.models.architecture import as_json
from slimstep.prune.budgets import Choice, Measured, choice, read_first_round
from slimstep.prune.evolve import apply

GREEDY, PROGRAM = "snapfusion", "program"
FRACTIONS = (0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)


@dataclass(frozen=True)
class Budget:
    """Both choices for a share of the latency, and what each has after recovery."""

    fraction: float
    chosen: dict[str, Choice]
    evaluations: dict[str, Evaluation]

    def difference(self, model: str = AFTER, metric: str = "clip") -> PairedDifference:
        """The program's metric less that of greedy removal, prompt by prompt."""
        program, greedy = (point(self.evaluations[search], model).metrics[metric] for search in (PROGRAM, GREEDY))
        return paired_difference(program["per_prompt"], greedy["per_prompt"])


def chosen(measured: Measured, fraction: float) -> dict[str, Choice]:
    """Greedy removal chooses among whole blocks, and the program among all changes."""
    whole = replace(measured, values=measured.removals)
    return {GREEDY: choice(whole, fraction, GREEDY), PROGRAM: choice(measured, fraction, PROGRAM)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of the teacher's latency")
    add_recovery(parser, Path("runs/budgets"), Path("benchmarks/search-budgets"))
    options = parser.parse_args()
    measured = read_first_round(options.run)
    options.root.mkdir(parents=True, exist_ok=True)
    found = {fraction: Budget(fraction, chosen(measured, fraction), {}) for fraction in options.fractions}
    if missed := [f"{b.fraction:g}" for b in found.values() if not all(c.is_reached for c in b.chosen.values())]:
        parser.error(f"--fractions {', '.join(missed)}: all changes of {options.run} together do not reach them")
    share, of = options.lane
    every = [(budget, search) for budget in found.values() for search in budget.chosen][share::of]
    first = None
    for budget, search in every:
        name = f"{search}-{budget.fraction:g}"
        architecture = as_json(apply(measured.before, budget.chosen[search].actions))
        budget.evaluations[search] = recovered(name, architecture, measured.skip_rule, first, options)
        first = first or options.root / name
    if of == 1:
        write_results(list(found.values()), options)


def write_results(found: Sequence[Budget], options: argparse.Namespace) -> None:
    table = Table.of({
        "budget": lambda budget: f"{budget.fraction:.0%}",
        "greedy removal, CLIP": lambda budget: clip(budget, GREEDY),
        "program, CLIP": lambda budget: clip(budget, PROGRAM),
        "program less greedy": lambda budget: signed(budget.difference()),
        "PSNR": lambda budget: signed(budget.difference(metric="psnr")),
        "right after the cut": lambda budget: signed(budget.difference(RIGHT_AFTER)),
        "changes": lambda budget: " and ".join(str(len(budget.chosen[search].actions)) for search in (GREEDY, PROGRAM)),
    }, found)  # fmt: skip
    write_text(options.out / "table.md", table.markdown)
    evaluation = found[0].evaluations[GREEDY]
    facts = {key: getattr(evaluation, key) for key in ("prompts", "n", "protocol", "environment")}
    write_json(options.out / "results.json", {
        **facts, "steps": options.steps, "batch": options.batch, "budgets": [as_record(budget) for budget in found],
    })  # fmt: skip
    print(table.console)


def as_record(budget: Budget) -> dict:
    networks = {
        search: {
            "changes": [action.change.label for action in made.actions], "share": round(made.share, 4),
            "clip": {key: round(point(budget.evaluations[search], AFTER).clip[key], 4) for key in ("mean", "se")},
        } for search, made in budget.chosen.items()
    }  # fmt: skip
    differences = {"clip": budget.difference(), "psnr": budget.difference(metric="psnr"),
                   "clip_right_after": budget.difference(RIGHT_AFTER)}  # fmt: skip
    return {
        "fraction": budget.fraction,
        **networks,
        "program_less_greedy": {k: asdict(d) for k, d in differences.items()},
    }


def clip(budget: Budget, search: str) -> str:
    measured = point(budget.evaluations[search], AFTER).clip
    return f"{measured['mean']:.2f} ± {measured['se']:.2f}"


def signed(difference: PairedDifference) -> str:
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


if __name__ == "__main__":
    open_console()
    main()
