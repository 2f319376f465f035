"""Reading finished evaluations, benchmarks, cumulative benchmarks and pipelines tables; which scores go together.

Two evaluations can be compared where prompts, scorer and seed are the same: their images i began as the same noise.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimstep.engine.files import damaged
from slimstep.eval.metrics.compare import PairedDifference, paired_difference, relative_to
from slimstep.eval.pages.runs import read_speed
from slimstep.eval.pages.text import flatten
from slimstep.eval.record import Evaluation, Point, read_evaluation

Results = Mapping[str, Any]
Setting = tuple[float, int]
SPEED_KINDS = ("benchmark", "cumulative", "pipelines")
OWN_COLUMNS = ("inception", "preferences", "metrics")  # of a protocol: they do not change a CLIP score


@dataclass(frozen=True)
class ResultRun:
    """A finished run; `kind` is 'evaluation', whose results are an Evaluation, or 'benchmark', 'cumulative' or
    'pipelines', whose results are results.json."""

    path: Path
    kind: str
    results: Any

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """How it was measured: title -> {name: value}."""
        if self.kind != "evaluation":
            names = ("models", "prompts", "prompts_hash", "n", "protocol")
            known = flatten({name: self.results[name] for name in names if name in self.results})
            return {self.kind.capitalize(): known, "Environment": flatten(self.results["environment"])}
        results: Evaluation = self.results
        names = ("models", "prompts", "prompts_hash", "n", "seen", "protocol")
        known = flatten({name: getattr(results, name) for name in names})
        for point in results.points:
            known[f"sampler.{point.model}"] = sampler(point)
        return {"Evaluation": known, "Environment": flatten(results.environment)}


@dataclass(frozen=True)
class Row(Point):
    """A point among those of several runs: its run, the model's name there (with the run where another run means
    something else by it) and its folder. `compared` is False for scores of other prompts, another scorer or seed, which
    have no difference."""

    run: str = ""
    label: str = ""
    where: str = ""
    compared: bool = True


def sampler(point: Point) -> str:
    """What an image depends on beside networks, prompt, setting and seed, in words."""
    settled = ("steps", "guidance_scale", "seed")
    known = flatten({name: value for name, value in point.protocol.items() if name not in settled})
    return ", ".join(f"{name} {value}" for name, value in known.items())


def read_results(folder: str | Path) -> ResultRun:
    """Raises FileNotFoundError where there is no finished run, ValueError where its results are damaged."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run in {path}; give the directory that train.py wrote")
    file = path / "results.json"
    results = read_speed(file) or {}
    if (kind := results.get("kind", "evaluation")) in SPEED_KINDS:
        with damaged(file):
            if missing := sorted({"models", "protocol", "environment", "rows"} - set(results)):
                raise ValueError(f"it lacks {', '.join(missing)}")
        return ResultRun(path, kind, results)
    if (evaluation := read_evaluation(path)) is None:
        raise FileNotFoundError(
            f"{path} holds no evaluation.json, no results.json and no round-00: it is no run, or one that is not "
            "finished; its command again continues it"
        )
    return ResultRun(path, "evaluation", evaluation)


def same_path(a: str, b: str) -> bool:
    """Whether two models are the same folder, or the same hub id; relative paths are seen from here."""
    return Path(a).resolve() == Path(b).resolve()


# ---- which scores go together ----


def metric(evaluation: Evaluation) -> tuple[str, dict[str, Any]]:
    """What makes scores comparable: the prompts, and the scorer with the seed."""
    return evaluation.prompts_hash, {key: v for key, v in evaluation.protocol.items() if key not in OWN_COLUMNS}


def gather(evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """The points of all evaluations, each once, with differences to the reference of the first one."""
    labels, (first, *_) = label_models(evaluations), evaluations.values()
    base = {point.guidance: point for point in first.points if first.is_reference(point)}
    gathered: dict[tuple[str, Setting], Row] = {}
    for run, evaluation in evaluations.items():
        compared = metric(evaluation) == metric(first)
        for point in evaluation.points:
            label, where = labels[run, point.model], evaluation.models[point.model]
            row = Row(**vars(point), run=run, label=label, where=where, compared=compared)
            if evaluation is not first:
                row = against(base.get(point.guidance) if compared else None, row, evaluation, first)
            gathered.setdefault((label, setting(point)), row)
    return list(gathered.values())


def setting(point: Point) -> Setting:
    return point.guidance, point.steps


def setting_text(setting: Setting) -> str:
    guidance, steps = setting
    return f"{steps} steps, guidance {guidance:g}"


def against(base: Point | None, row: Row, other_run: Evaluation, first: Evaluation) -> Row:
    """Another evaluation's point, its scores relative to `base`; nearness to another reference is left out."""
    mine, theirs = (e.protocol.get("metrics") or e.protocol.get("preferences") or {} for e in (other_run, first))

    def shown(name: str, measured: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if not measured or measured["kind"] == "distribution":
            return measured
        if measured["kind"] == "paired":
            same = base and other_run.reference == first.reference and same_model(first, other_run, base.model)
            return measured if same else None
        other = base and (name == "clip" or mine.get(name) == theirs.get(name)) and base.metrics.get(name)
        return relative_to(other, measured)

    return replace(row, metrics={name: shown(name, measured) for name, measured in row.metrics.items()})


def label_models(evaluations: Mapping[str, Evaluation]) -> dict[tuple[str, str], str]:
    """{(run, model): label}, so that one label is one model with one set of scores."""
    meant: dict[str, str] = {}
    labels = {}
    for run, evaluation in evaluations.items():
        for model in evaluation.models:
            known = meant.setdefault(model, run)
            same = known == run or same_model(evaluations[known], evaluation, model)
            labels[run, model] = model if same else f"{model} ({run})"
    return labels


def same_model(first: Evaluation, other: Evaluation, model: str) -> bool:
    """Whether both mean the same by a name: path, metric, and scores at every setting that both have."""
    if metric(first) != metric(other) or not same_path(first.models[model], other.models[model]):
        return False
    ours, theirs = ({setting(p): p.clip["per_prompt"] for p in e.points if p.model == model} for e in (first, other))
    return all(ours[key] == theirs[key] for key in set(ours) & set(theirs))


# ---- every two models ----


def common_settings(points: Sequence[Point]) -> list[Setting]:
    """The settings that two models or more were evaluated at, those of most models first."""
    count = Counter(setting(point) for point in points)
    return [key for key, models in count.most_common() if models > 1]


def pair_matrix(points: Sequence[Point]) -> list[list[PairedDifference | None]]:
    """How much higher each row's scores are than each column's, prompt by prompt; None on the diagonal."""
    scores = [point.clip["per_prompt"] for point in points]
    size = range(len(points))
    upper = {(i, j): paired_difference(scores[i], scores[j]) for i in size for j in size if i < j}
    return [[upper.get((i, j)) or (turned(upper[j, i]) if i != j else None) for j in size] for i in size]


def turned(d: PairedDifference) -> PairedDifference:
    """The difference the other way round."""
    return PairedDifference(0 - d.mean, d.se, 0 - d.high, 0 - d.low, d.n)
