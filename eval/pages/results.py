"""Reading the results.json of finished evaluations, benchmarks, ladders and pipelines tables; which scores go together.

An evaluation holds points: a model at a setting, (guidance scale, sampling steps), with the CLIP score of every prompt.
Two evaluations can be compared where prompts, scorer and seed are the same: their images i began as the same noise.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimstep.engine.files import damaged
from slimstep.eval.metrics.compare import PairedDifference, paired_difference
from slimstep.eval.pages.runs import read_json
from slimstep.eval.pages.text import SEEN, flatten

Point = Mapping[str, Any]
Results = Mapping[str, Any]
Setting = tuple[float, int]
SPEED_KINDS = ("benchmark", "ladder", "pipelines")
OWN_COLUMNS = ("inception", "preferences")  # of an evaluation's protocol: they do not change a CLIP score


@dataclass(frozen=True)
class ResultRun:
    """A finished run; `kind` is 'evaluation', 'benchmark', 'ladder' or 'pipelines'."""

    path: Path
    kind: str
    results: Results

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """How it was measured: title -> {name: value}."""
        names = ("models", "prompts", "prompts_hash", "n", *SEEN, "protocol")
        told = flatten({name: self.results[name] for name in names if name in self.results})
        for point in self.results.get("points", ()):
            told[f"sampler.{point['model']}"] = sampler(point)
        return {self.kind.capitalize(): told, "Environment": flatten(self.results["environment"])}


def sampler(point: Point) -> str:
    """What an image depends on beside networks, prompt, setting and seed, in words."""
    settled = ("steps", "guidance_scale", "seed")
    told = flatten({name: value for name, value in point["protocol"].items() if name not in settled})
    return ", ".join(f"{name} {value}" for name, value in told.items())


def read_results(folder: str | Path) -> ResultRun:
    """Raises FileNotFoundError where there is no finished run, ValueError where its results are damaged."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run in {path}; give the directory that train.py wrote")
    file = path / "results.json"
    results = read_json(file)
    if results is None:
        raise FileNotFoundError(
            f"{path} holds no results.json, no round-00 and no evaluation.json: it is no run, or one that is not "
            "finished; its command again continues it"
        )
    with damaged(file):
        kind = results.get("kind", "evaluation")
        needed = {"models", "protocol", "environment", "rows" if kind in SPEED_KINDS else "points"}
        if missing := sorted(needed - set(results)):
            raise ValueError(f"it lacks {', '.join(missing)}")
    return ResultRun(path, kind, results)


def same_path(a: str, b: str) -> bool:
    """Whether two models are the same folder, or the same hub id; relative paths are seen from here."""
    return Path(a).resolve() == Path(b).resolve()


# ---- which scores go together ----


def metric(results: Results) -> tuple[str, dict[str, Any]]:
    """What makes scores comparable: the prompts, and the scorer with the seed."""
    protocol = {key: value for key, value in results["protocol"].items() if key not in OWN_COLUMNS}
    return results["prompts_hash"], protocol


def gather(evaluations: Mapping[str, Results]) -> list[dict[str, Any]]:
    """The points of all evaluations, each once, with differences to the reference of the first one.

    Added are `run`, `label` (the model's name, with its run where another run means something else by it), `where` and
    `compared`: False for scores of other prompts, another scorer or seed, which have no difference.
    """
    labels, (first, *_) = label_models(evaluations), evaluations.values()
    base = {p["guidance"]: p for p in first["points"] if is_reference(p, first)}
    gathered: dict[tuple[str, Setting], dict[str, Any]] = {}
    for run, results in evaluations.items():
        compared = metric(results) == metric(first)
        for point in results["points"]:
            label, where = labels[run, point["model"]], results["models"][point["model"]]
            row = {**point, "run": run, "label": label, "where": where, "compared": compared}
            if results is not first:
                row |= against(base.get(point["guidance"]) if compared else None, point, results, first)
            gathered.setdefault((label, setting(point)), row)
    return list(gathered.values())


def is_reference(point: Point, results: Results) -> bool:
    """Whether differences are to this point, or to those of its model and steps at another guidance scale."""
    return {key: point[key] for key in ("model", "steps")} == results["reference"]


def setting(point: Point) -> Setting:
    return point["guidance"], point["steps"]


def told(setting: Setting) -> str:
    guidance, steps = setting
    return f"{steps} steps, guidance {guidance:g}"


def against(base: Point | None, point: Point, results: Results, first: Results) -> dict[str, Any]:
    """What of another evaluation's point is told relative to a reference, told relative to `base`."""

    def versus(own: Mapping, other: Mapping | None) -> dict[str, float] | None:
        return asdict(paired_difference(own["per_prompt"], other["per_prompt"])) if other else None

    def judged_alike(name: str) -> bool:
        mine, theirs = (r["protocol"].get("preferences") or {} for r in (results, first))
        return mine.get(name) == theirs.get(name)

    theirs = base["preferences"] if base else {}
    preferences = {
        name: {**own, "versus_reference": versus(own, theirs.get(name) if judged_alike(name) else None)}
        for name, own in point["preferences"].items()
    }
    shown = {"versus_reference": versus(point["clip"], base and base["clip"]), "preferences": preferences}
    same_images = base and results["reference"] == first["reference"] and same_model(first, results, base["model"])
    return shown if same_images else {**shown, "to_reference": None}


def label_models(evaluations: Mapping[str, Results]) -> dict[tuple[str, str], str]:
    """{(run, model): label}, so that one label is one model with one set of scores."""
    meant: dict[str, str] = {}
    labels = {}
    for run, results in evaluations.items():
        for model in results["models"]:
            known = meant.setdefault(model, run)
            same = known == run or same_model(evaluations[known], results, model)
            labels[run, model] = model if same else f"{model} ({run})"
    return labels


def same_model(first: Results, other: Results, model: str) -> bool:
    """Whether both mean the same by a name: path, metric, and scores at every setting that both have."""
    if metric(first) != metric(other) or not same_path(first["models"][model], other["models"][model]):
        return False
    ours, theirs = ({setting(p): p["clip"]["per_prompt"] for p in r["points"] if p["model"] == model}
                    for r in (first, other))  # fmt: skip
    return all(ours[key] == theirs[key] for key in set(ours) & set(theirs))


# ---- every two models ----


def common_settings(points: Sequence[Point]) -> list[Setting]:
    """The settings that two models or more were judged at, those of most models first."""
    count = Counter(setting(point) for point in points)
    return [key for key, models in count.most_common() if models > 1]


def pair_matrix(points: Sequence[Point]) -> list[list[PairedDifference | None]]:
    """How much higher each row's scores are than each column's, prompt by prompt; None on the diagonal."""
    scores = [point["clip"]["per_prompt"] for point in points]
    size = range(len(points))
    upper = {(i, j): paired_difference(scores[i], scores[j]) for i in size for j in size if i < j}
    return [[upper.get((i, j)) or (turned(upper[j, i]) if i != j else None) for j in size] for i in size]


def turned(d: PairedDifference) -> PairedDifference:
    """The difference the other way round."""
    return PairedDifference(0 - d.mean, d.se, 0 - d.high, 0 - d.low, d.n)
