"""Do scores before recovery tell what is left after it? Many networks of equal latency, each recovered alike.

    python benchmarks/search_truth.py --run runs/prune_unet --root runs/truth                      # some hours
    python benchmarks/search_truth.py --run runs/prune_dit --of transformer --root runs/dit-truth

The networks are sets of removals that the latency table of --run's first round puts at --fraction of the teacher's
milliseconds: the cheapest by its block scores with noise of several sizes, random ones, and the choices of both
searches. Each starts from that round's weights, is recovered by the same training, and is evaluated on prompts that
nothing was chosen on. Against the CLIP score after recovery stand what can be known before: sums of block scores, of
pictures' errors, of scores after local recovery (--recovered-scores), of image_error (--image-errors), of similarities
and of squared weights, parameters, and the CLIP score right after the cut. To --out go table.md and results.json, with
Spearman's correlations and the regret of each predictor's choice, intervals by bootstrap over networks. Killed, it
continues; --count may grow.
On several cores, one process for each --lane 0/2, 1/2, then one without it that gathers what they have made.
"""

import argparse
import filecmp
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distill_table import share_teacher
from benchmarks.launching import run_job
from slimstep.engine.console import open_console
from slimstep.engine.files import load_json, whole_folder, write_json, write_text
from slimstep.eval.metrics.compare import bootstrap, interval, spearman
from slimstep.eval.pages.tables import Table
from slimstep.eval.record import Evaluation, read_evaluation
from slimstep.prune.budgets import read_first_round
from slimstep.prune.evolve import BlockValue, choose_removals, priced
from slimstep.prune.program import program_removals

NOISE = (0.0, 0.05, 0.15, 0.3, 0.6, math.inf)  # of the ranks, in units of the number of blocks
NEAR = 0.02  # below the fraction: a set that cannot be met so closely is drawn anew
AFTER, RIGHT_AFTER = "student", "round-00"
RESAMPLES = 2000
COMMAND = "command.json"  # of a finished network's run
SkipRule = str | dict[str, str] | None


@dataclass(frozen=True)
class Network:
    """A set of removed blocks, its share of the teacher's milliseconds by the table, and how it was chosen."""

    name: str
    removed: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Found:
    """What a network had after recovery, and its predictors: the higher, the better it is held to be."""

    network: Network
    clip: float
    se: float
    psnr: float
    predictors: Mapping[str, float]


# ---- the networks ----


def networks(values: Sequence[BlockValue], teacher_ms: float, fraction: float, count: int) -> list[Network]:
    """The choices of both searches, and `count` sets in orders with noise, no set twice."""
    values = priced(values)
    chosen = {"snapfusion": choose_removals, "program": program_removals}
    found = {}
    for name, choose in chosen.items():
        actions = choose(values, teacher_ms, fraction * teacher_ms)
        removed = tuple(sorted(action.block for action in actions))
        found.setdefault(removed, Network(name, removed, actions[-1].predicted_ms / teacher_ms))
    draw = np.random.default_rng(0)
    order = sorted(range(len(values)), key=lambda n: values[n].removal_order)
    for attempt in range(1000 * count):
        if len(found) >= count + len(chosen):
            break
        noise = NOISE[attempt % len(NOISE)]  # without any there is one set alone
        size = len(values) * (10.0 if math.isinf(noise) else noise)
        noisy = np.argsort(np.argsort(order) + size * draw.standard_normal(len(values)))
        ms, removed = teacher_ms, []
        for value in (values[n] for n in noisy):
            if value.saved_ms > 0 and ms - value.saved_ms >= (fraction - NEAR) * teacher_ms:
                removed.append(value.block)
                ms -= value.saved_ms
        key = tuple(sorted(removed))
        if ms <= fraction * teacher_ms and key not in found:
            found[key] = Network(f"noise-{noise:g}-{len(found)}", key, ms / teacher_ms)
    return list(found.values())


# ---- their truth ----


def recovered(
    name: str, architecture: Mapping[str, Any], skip_rule: SkipRule, first: Path | None, options: argparse.Namespace
) -> Evaluation:
    """Runs or continues the job of a network, from the first round's weights and with its latencies. The teacher's
    images are those of `first`, another network's run. ValueError where the folder is of another network."""
    path, source, files = options.root / name, options.run / "round-00", ("weights.safetensors", "latency.json")
    table, described = options.root / f"{name}.json", json.dumps(architecture, indent=1)
    if not (path / "round-00").exists():
        write_text(table, described)
        with whole_folder(path / "round-00") as aside:
            for file in files:
                shutil.copyfile(source / file, aside / file)
    same = all(filecmp.cmp(source / file, path / "round-00" / file, shallow=False) for file in files)
    if not same or table.read_text() != described:
        raise ValueError(f"{path} is of another network or of another run than {options.run}: give another --root")
    if first:
        share_teacher(first, path)
    if isinstance(skip_rule, dict):
        skip_rule = f"{{{','.join(f'{block}:{rule}' for block, rule in skip_rule.items())}}}"
    command = [
        f"root={options.root}", f"name={name}", "search=manual", f"search.method.architecture={table}",
        f"search.skip_rule={skip_rule or 'shortcut'}",
        f"recovery.train.steps={options.steps}", f"recovery.train.batch_size={options.batch}", "eval.prompts=192",
        "eval.steps=8", "latency.iterations=3", "latency.additive_samples=1", *options.overrides,
    ]  # fmt: skip
    if not finished_by(path, command):
        run_job(f"prune_{options.of}", command)
        write_json(path / COMMAND, command)
    evaluation = read_evaluation(path)
    assert evaluation, f"{path} has no evaluation"
    return evaluation


def finished_by(path: Path, command: Sequence[str]) -> bool:
    """Whether the same command has finished there: one that only gathers need not import torch for every network."""
    return (path / COMMAND).exists() and load_json(path / COMMAND) == command


def point(evaluation: Evaluation, model: str):
    return next(p for p in evaluation.points if p.model == model)


def found_of(network: Network, evaluation: Evaluation, per_block: Mapping[str, Mapping[str, float]]) -> Found:
    after = point(evaluation, AFTER)
    sums = {name: -sum(of[block] for block in network.removed) for name, of in per_block.items()}
    right_after = point(evaluation, RIGHT_AFTER)
    known = {"CLIP right after the cut": right_after.clip["mean"], "parameters left": after.facts["parameters"]["UNet"]}
    return Found(network, after.clip["mean"], after.clip["se"], after.mean("psnr"), {**sums, **known})


def block_predictors(
    run: Path, values: Sequence[BlockValue], similarities: Path | None, recovered: Path | None = None,
    image_errors: Path | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """{predictor: {block: what its removal is held to cost}}. similarities, recovered: files of other runs."""
    found = {
        "sum of CLIP lost": {value.block: value.delta_clip for value in values},
        "sum of CLIP lost, not below 0": {value.block: max(value.price, 0.0) for value in priced(values)},
        "sum of pictures' errors": {value.block: value.picture_error for value in values},
        "squared weights": squared_weights(run / "round-00/weights.safetensors", [value.block for value in values]),
    }
    if image_errors:
        record = load_json(image_errors)
        if (metric := record["protocol"]["metric"]) != "image_error":
            way = "give one of search.metric=image_error"
            raise ValueError(f"--image-errors {image_errors} was scored by {metric}; {way}")
        found["sum of image_error"] = {block: row["delta_clip"] for block, row in record["sites"].items()}
    if similarities:
        alike = load_json(similarities)["blocks"]
        # A block whose output has another shape than its input is held to change it as much as any other.
        least = min(value for value in alike.values() if value is not None)
        found["input and output similarity"] = {b: 1 - (least if x is None else x) for b, x in alike.items()}
    return {**found, **(recovered_predictors(recovered, [value.block for value in values]) if recovered else {})}


def recovered_predictors(file: Path, blocks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of a scores.json of a run with scoring.recovery_steps. ValueError where it has none, or lacks blocks."""
    rows = load_json(file)["sites"]
    if missing := [block for block in blocks if "before_recovery" not in rows.get(block, {})]:
        way = "give round-00/scores.json of a run of the same network with scoring.recovery_steps above 0"
        raise ValueError(f"--recovered-scores {file} has no score after local recovery of {missing}; {way}")
    errors = {block: rows[block]["prediction_error"] for block in blocks}
    return {
        "sum of CLIP lost after local recovery": {block: rows[block]["delta_clip"] for block in blocks},
        "sum of errors after local recovery": {block: error["after"] for block, error in errors.items()},
        "sum of errors that a linear map leaves": {block: error["linear_map"] for block, error in errors.items()},
    }


def squared_weights(file: Path, blocks: Sequence[str]) -> dict[str, float]:
    sums = dict.fromkeys(blocks, 0.0)
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118  no mapping
            if holder := max((b for b in blocks if name.startswith(f"{b}.")), key=len, default=None):
                sums[holder] += float(weights.get_tensor(name).double().square().sum())
    return sums


# ---- what predicts it ----


def row_of(name: str, found: Sequence[Found]) -> dict[str, str]:
    values, truth = np.array([f.predictors[name] for f in found]), np.array([f.clip for f in found])
    first = next(iter(found[0].predictors))
    against = np.array([f.predictors[first] for f in found])
    better = truth >= np.median(truth)
    regrets = [truth[draw].max() - truth[draw][values[draw].argmax()] for draw in resamples(len(found))]
    low, high = interval(regrets)
    return {
        "predictor": name,
        "Spearman with CLIP after recovery": correlation(values, truth),
        f"more than the {first}": "–" if name == first else ahead(values, against, truth),
        "among the better half": correlation(values[better], truth[better]),
        "regret of its choice, CLIP": f"{truth.max() - truth[values.argmax()]:.2f} [{low:.2f}, {high:.2f}]",
    }


def resamples(size: int) -> Iterator[np.ndarray]:
    return (draw for draws in bootstrap(size, RESAMPLES) for draw in draws)


def correlation(a: np.ndarray, b: np.ndarray) -> str:
    low, high = interval(defined(correlations(a, b)))
    return f"{spearman(a, b):.2f} [{low:.2f}, {high:.2f}]"


def ahead(a: np.ndarray, other: np.ndarray, truth: np.ndarray) -> str:
    """How much higher the correlation of `a` is than that of `other`, on the same resamples."""
    low, high = interval(defined(correlations(a, truth) - correlations(other, truth)))
    return f"{spearman(a, truth) - spearman(other, truth):+.2f} [{low:+.2f}, {high:+.2f}]"


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's of each resample; nan where one of the two is the same throughout."""
    ranks = (np.concatenate([rankdata(x[draws], axis=1) for draws in bootstrap(len(x), RESAMPLES)]) for x in (a, b))
    x_RN, y_RN = (rank_RN - rank_RN.mean(1, keepdims=True) for rank_RN in ranks)
    norms_R = np.sqrt((x_RN**2).sum(1) * (y_RN**2).sum(1))
    return np.divide((x_RN * y_RN).sum(1), norms_R, out=np.full(len(x_RN), np.nan), where=norms_R > 0)


def defined(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def add_recovery(parser: argparse.ArgumentParser, root: Path, out: Path) -> None:
    """Of which networks, and how they are recovered; shared with search_budgets.py."""
    parser.add_argument("--run", type=Path, required=True, help="a pruning run with the scores of its first round")
    parser.add_argument("--of", choices=("unet", "transformer"), default="unet", help="what is pruned")
    parser.add_argument("--root", type=Path, default=root, help="where the runs go")
    parser.add_argument("--out", type=Path, default=out, help="where the results go")
    parser.add_argument("--lane", type=lane, default=(0, 1), metavar="K/N",
                        help="make the K-th of N shares of the networks and no table: 0/2")  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, help="of recovery")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all runs")


def lane(text: str) -> tuple[int, int]:
    share, of = map(int, text.split("/"))
    if not 0 <= share < of:
        raise argparse.ArgumentTypeError(f"--lane {text} is not one of 0/{of} to {of - 1}/{of}")
    return share, of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--similarities", type=Path, help="round-00/similarities.json of a run of search=similarity")
    parser.add_argument("--recovered-scores", type=Path,
                        help="round-00/scores.json of a run with scoring.recovery_steps above 0")  # fmt: skip
    parser.add_argument("--image-errors", type=Path,
                        help="round-00/scores.json of a run with search.metric=image_error")  # fmt: skip
    parser.add_argument("--fraction", type=float, default=0.7, help="of the teacher's latency")
    parser.add_argument("--count", type=int, default=60, help="of networks beside the searches' choices")
    add_recovery(parser, Path("runs/truth"), Path("benchmarks/search-truth"))
    options = parser.parse_args()
    measured = read_first_round(options.run)
    options.root.mkdir(parents=True, exist_ok=True)
    of_other_runs = options.similarities, options.recovered_scores, options.image_errors
    per_block = block_predictors(options.run, measured.removals, *of_other_runs)
    share, of = options.lane
    every = networks(measured.removals, measured.teacher_ms, options.fraction, options.count)[share::of]
    found: list[Found] = []
    table: Table | None = None
    for network in every:
        first, removed = options.root / every[0].name if found else None, dict.fromkeys(network.removed, 0)
        evaluation = recovered(network.name, removed, measured.skip_rule, first, options)
        found.append(found_of(network, evaluation, per_block))
        if of == 1 and len(found) >= 8:
            table = write_results(found, evaluation, options)
    if table:
        print(f"{len(found)} networks\n{table.console}")


def write_results(found: Sequence[Found], evaluation: Evaluation, options: argparse.Namespace) -> Table:
    rows = [row_of(name, found) for name in found[0].predictors]
    table = Table.of({heading: (lambda row, heading=heading: row[heading]) for heading in rows[0]}, rows)
    write_text(options.out / "table.md", table.markdown)
    facts = {key: getattr(evaluation, key) for key in ("prompts", "n", "protocol", "environment")}
    own = [{"name": f.network.name, "removed": f.network.removed, "share": round(f.network.share, 4),
            "clip": round(f.clip, 4), "se": round(f.se, 4), "psnr": round(f.psnr, 3),
            "predictors": {k: round(v, 5) for k, v in f.predictors.items()}} for f in found]  # fmt: skip
    settings = {"fraction": options.fraction, "steps": options.steps, "batch": options.batch}
    write_json(options.out / "results.json", {**facts, **settings, "networks": own, "table": rows})
    return table


if __name__ == "__main__":
    open_console()
    main()
