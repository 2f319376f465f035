"""An evaluation as a value: models at settings, on the same prompts from the same noise, and what metrics say of them.

Every job that evaluates writes it as evaluation.json, and every page is drawn from it. Nothing here computes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimstep.engine.files import damaged, load_json

FILE = "evaluation.json"
Values = Mapping[str, Any]
Key = tuple[str, int, float]  # model, sampling steps, guidance scale


@dataclass(frozen=True)
class Point:
    """A model at one setting.

    `metrics`: {name: {"kind", …}}; of kind per_image and paired "mean", "se" and "per_prompt" (a value for every
    distinct prompt), and "versus_reference", the paired difference to the reference; of kind per_prompt, measured by
    "seeds" images of each of the first "n" prompts, and of what is "compared_by_ratio", "ratio_to_reference" too; of
    kind distribution its numbers.
    A paired metric has the reference's images of the same noise beside it, and is None for images of another size.
    `guidance` is the scale of the reference that it is compared with; a model of few steps may have its own.
    `facts`: what else is known, as "parameters" and "evaluations" (of the network, for one image).
    """

    model: str
    steps: int
    guidance: float
    metrics: Mapping[str, Values | None]
    protocol: Values
    facts: Values = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.model, self.steps, self.guidance

    @property
    def sampled_guidance(self) -> float:
        """The scale that it was sampled with; `guidance` is that of the reference beside it."""
        return self.protocol.get("guidance_scale", self.guidance)

    @property
    def clip(self) -> Values:
        clip = self.metrics["clip"]
        assert clip, "every image has a CLIP score"
        return clip

    @property
    def versus_reference(self) -> Values | None:
        """The paired difference of CLIP score; None for the reference itself, and where there is no CLIP score."""
        return (self.metrics.get("clip") or {}).get("versus_reference")

    def mean(self, name: str) -> float | None:
        """The mean of a metric, None where it was not measured."""
        measured = self.metrics.get(name)
        return measured["mean"] if measured else None

    def of_kind(self, kind: str) -> dict[str, Values]:
        return {name: own for name, own in self.metrics.items() if own and own["kind"] == kind}


@dataclass(frozen=True)
class Evaluation:
    """Points that can be compared, prompt by prompt.

    `models`: {name: the folder or hub id, or what it is within its run}. `reference`: the model and the number of steps
    that differences are to, at the same guidance scale. `n`: distinct prompts. `seen`: how many of them were seen
    before, and as what. `protocol`: what makes scores comparable beside the prompts.
    """

    models: Mapping[str, str]
    reference: Values
    prompts: str
    prompts_hash: str
    n: int
    shown: tuple[str, ...]
    protocol: Values
    points: tuple[Point, ...]
    environment: Values
    seen: Mapping[str, int] = field(default_factory=dict)
    facts: Values = field(default_factory=dict)

    @property
    def has_prompts(self) -> bool:
        """Whether images were scored for prompts, as those of an unconditional model cannot be."""
        return all("clip" in point.metrics for point in self.points)

    def find(self, model: str, steps: int, guidance: float) -> Point | None:
        return next((point for point in self.points if point.key == (model, steps, guidance)), None)

    def is_reference(self, point: Point) -> bool:
        return {"model": point.model, "steps": point.steps} == self.reference

    def as_json(self) -> dict[str, Any]:
        return {"kind": "evaluation", **asdict(self)}

    @classmethod
    def from_json(cls, value: Values) -> "Evaluation":
        """Raises ValueError, or KeyError of a point, for a table that lacks something."""
        if missing := [name for name in cls.__dataclass_fields__ if name not in value]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        own = {name: value[name] for name in cls.__dataclass_fields__}
        points = tuple(Point(**{name: point[name] for name in Point.__dataclass_fields__}) for point in own["points"])
        return cls(**{**own, "points": points, "shown": tuple(own["shown"])})


def read_evaluation(folder: str | Path) -> Evaluation | None:
    """The evaluation that a run's folder holds, of this version or an earlier one; None where there is none (yet).

    Raises ValueError, naming the file, where it is damaged.
    """
    for name in (FILE, "results.json"):
        if (file := Path(folder) / name).is_file():
            value = load_json(file)
            with damaged(file):
                if value.get("kind") == "evaluation":
                    return Evaluation.from_json(value)
                if "kind" not in value:
                    return former(value)
    return None


# ---- as earlier versions wrote it ----


def former(value: Values) -> Evaluation:
    """What evaluation.json and results.json were before there was one layout."""
    if "decoders" in value:
        return of_decoders(value)
    if isinstance(value.get("models"), list):
        return of_pruning(value)
    if "reference" in value:
        return of_models(value)
    if "points" in value:
        return of_distillation(value)
    raise ValueError("it holds no evaluation")


def whole(value: Values, points: list[Point], reference: Values, **own: Any) -> Evaluation:
    """Of the keys that all layouts shared."""
    seen = {key: count for key, count in value.items() if key.startswith("prompts_in_")}
    shared = {"models": {point.model: point.model for point in points}, "shown": (), "prompts": "", "environment": {}}
    kept = present(value, "prompts", "prompts_hash", "n", "protocol", "environment")
    return Evaluation(**{**shared, **kept, "reference": reference, "points": tuple(points), "seen": seen, **own})


def present(value: Values, *keys: str) -> dict[str, Any]:
    return {key: value[key] for key in keys if key in value}


def per_image(score: Values, versus: Values | None) -> Values:
    return {"kind": "per_image", **score, "versus_reference": versus}


def paired(mean: float | None, se: float | None = None, per_prompt: list[float] | None = None) -> Values | None:
    return None if mean is None else {"kind": "paired", "mean": mean, "se": se, "per_prompt": per_prompt}


def of_models(value: Values) -> Evaluation:
    def point(p: Values) -> Point:
        near = p["to_reference"] or {}
        metrics: dict[str, Values | None] = {"clip": per_image(p["clip"], p["versus_reference"])}
        metrics |= {name: per_image(own, own["versus_reference"]) for name, own in p["preferences"].items()}
        metrics |= {name: paired(near[name]["mean"], near[name]["se"]) if near else None
                    for name in ("psnr", "features")}  # fmt: skip
        if p["distribution"]:
            metrics |= split_distances(p["distribution"])
        facts = present(p, "parameters", "evaluations", "against_shuffled")
        return Point(p["model"], p["steps"], p["guidance"], metrics, p["protocol"], facts)

    return whole(value, [point(p) for p in value["points"]], value["reference"], models=value["models"],
                 shown=tuple(value["shown"]))  # fmt: skip


def split_distances(distances: Values) -> dict[str, Values]:
    """Of the scorer's features, and of Inception's."""
    counts = present(distances, "n", "n_real")
    sets = {"fd": ("fd", "kd", "kd_se", "features"), "fid": ("fid", "kid", "kid_se")}
    return {name: {"kind": "distribution", **present(distances, *keys), **counts}
            for name, keys in sets.items() if name in distances}  # fmt: skip


def of_pruning(value: Values) -> Evaluation:
    protocol = value["protocol"]
    steps, guidance = protocol.get("steps", 0), protocol.get("guidance_scale", 0.0)

    def point(m: Values) -> Point:
        metrics = {"clip": per_image(m["clip"], m["versus_teacher"]), "psnr": paired(m.get("psnr_to_teacher"))}
        facts = {"parameters": {"UNet": m["parameters"]}, "gflops": m["gflops"], **present(m, "against_shuffled")}
        return Point(m["name"], steps, guidance, metrics, protocol, facts)

    times = {m["name"]: m["ms"] for m in value["models"]}
    return whole(value, [point(m) for m in value["models"]], {"model": "teacher", "steps": steps}, facts={"ms": times})


def of_distillation(value: Values) -> Evaluation:
    def point(p: Values) -> Point:
        error = p["latent_error_to_teacher"]
        metrics = {
            "clip": per_image(p["clip"], p["versus_teacher"]),
            "psnr": paired(p["psnr_to_teacher"]),
            "features": paired(p["feature_cosine_to_teacher"]),
            "latent_error": paired(error["mean"], None, error["per_prompt"]),
        }
        facts = present(p, "evaluations", "against_shuffled")
        return Point(p["model"], p["steps"], p["guidance"], metrics, p["protocol"], facts)

    points = [point(p) for p in value["points"]]
    most = max(point.steps for point in points if point.model == "teacher")
    return whole(value, points, {"model": "teacher", "steps": most})


def of_decoders(value: Values) -> Evaluation:
    protocol = value["protocol"]
    names = {"wide": "teacher", "sliced": "pruned", "narrow": "student"}
    steps, guidance = protocol.get("steps", 0), protocol.get("guidance_scale", 0.0)

    def nearness(own: Values | None) -> dict[str, Values | None]:
        return {name: paired(m["mean"], m["se"], m["per_item"]) for name, m in (own or {}).items()}

    def point(d: Values) -> Point:
        name: str = d["name"]
        near = d["nearness"]
        metrics = {"clip": per_image(d["clip"], d["versus_wide"]), **nearness(near["sampled_to_wide"])}
        metrics |= {f"real_{name}": own for name, own in nearness(near["real_to_wide"]).items()}
        metrics |= {f"image_{name}": own for name, own in nearness(near["real_to_image"]).items()}
        facts = {"parameters": {"decoder": d["parameters"]}, **present(d, "against_shuffled")}
        return Point(names.get(name, name), steps, guidance, metrics, protocol, facts)

    widths = {names[name]: channels for name, channels in value["widths"].items()}
    return whole(value, [point(d) for d in value["decoders"]], {"model": "teacher", "steps": steps},
                 facts={"widths": widths, "n_real": value["n_real"]})  # fmt: skip
