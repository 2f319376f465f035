"""Is the evolved student better than a random and a hand-picked one of equal latency? Same training, other prompts.

    python benchmarks/prune_baselines.py --root runs/baselines --fraction 0.75
    python benchmarks/prune_baselines.py --of transformer --root runs/dit-baselines --fraction 0.7

Every run is the pruning job with one round, of a UNet with BK-SDM's skip rule. All start from the same network of
stochastic-depth training (the first run's, whose weights the others find in their place), are cut to the same measured
latency, recover for the same number of steps, and are evaluated on the same prompts, which no block was ranked on. To
--out go the table with paired differences, the picture of CLIP against latency, every run's evaluation, and the scores
of all blocks. Started again, it continues.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launching import run_job
from slimstep.engine.console import open_console
from slimstep.engine.files import whole_folder
from slimstep.eval.pages.comparison import compare_runs

EVOLVED = {"snapfusion": ["search=snapfusion"]}
RANDOM = {f"random-{n}": ["search=random", f"search.method.seed={n}"] for n in range(3)}
BY_HAND = {"unet": ("bk_sdm",), "transformer": ("similarity", "middle", "every_second")}
RULES = {of: {**EVOLVED, **{rule: [f"search={rule}"] for rule in rules}, **RANDOM} for of, rules in BY_HAND.items()}
OWN = {"unet": ["search.skip_rule=drop_skip"], "transformer": []}
OUT = {"unet": "benchmarks/prune-baselines", "transformer": "benchmarks/prune-baselines-transformer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/baselines"), help="where the runs go")
    parser.add_argument("--of", choices=RULES, default="unet", help="the bundled model that is pruned")
    parser.add_argument("--out", type=Path, help="where the results go (default: in benchmarks/)")
    parser.add_argument("--fraction", type=float, default=0.75, help="of the teacher's UNet latency")
    parser.add_argument("--processes", type=int, default=1, help="more than one starts torchrun")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all runs")
    options = parser.parse_args()
    rules, out = RULES[options.of], options.out or Path(OUT[options.of])
    for rule, overrides in rules.items():
        share_trained_weights(options.root / "snapfusion", options.root / rule)
        search = ["search.rounds=1", *OWN[options.of], f"search.target_fraction={options.fraction}"]
        own = [*search, f"root={options.root}", f"name={rule}", *overrides, *options.overrides]
        run_job(f"prune_{options.of}", own, options.processes, fine=(0, 3))
    print(compare_runs([options.root / rule for rule in rules], out))
    for rule in rules:
        shutil.copyfile(options.root / rule / "evaluation.json", out / f"{rule}.json")
    shutil.copyfile(options.root / "snapfusion/round-00/scores.json", out / "block-scores.json")


def share_trained_weights(source: Path, run: Path) -> None:
    """A stage whose weights exist is not trained again."""
    weights, target = source / "round-00/weights.safetensors", run / "round-00/weights.safetensors"
    if weights.exists() and not target.exists():
        with whole_folder(target.parent) as aside:
            shutil.copyfile(weights, aside / weights.name)


if __name__ == "__main__":
    open_console()
    main()
