"""The one evaluator: models at settings, on the same prompts from the same noise, measured by metrics.

Image i of a model is a function of (seed, prompt i, setting) alone, whatever batch or process draws it. A point that is
there is not made again, and a killed one goes on at the batch where it stopped.

Axes: P prompts, R real images, D features, H and W height and width in pixels.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from slimstep.data.prompts import PromptSet
from slimstep.engine.environment import environment
from slimstep.engine.files import damaged
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.inputs import real_images
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.compare import mean_and_error, relative_to
from slimstep.eval.metrics.diversity import first_of_texts, further_seeds, mean_pairwise_distance, runs_of, stacked
from slimstep.eval.metrics.metric import DistributionMetric, Kind, Metric, of_kind
from slimstep.eval.metrics.video import features_of
from slimstep.eval.pages.videos import write_animation
from slimstep.eval.record import FILE, Evaluation, Key, Point, Values, read_evaluation
from slimstep.eval.scorer_check import compare_teacher

PARTIAL = "partial"  # where unfinished work lies, batch by batch
IN_A_ROW = 9  # frames of a video in a picture
Draw = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A model at one setting. `draw(indices)` gives its samples of these prompts, `images(samples)` uint8 images
    [B, 3, H, W] of them, or videos [B, F, H, W, 3]; of all candidates of an evaluation `images` does the same to equal
    samples. `reseeded(seed)` is `draw` with another seed, None where samples have no noise of their own. `more()` gives
    metrics of the job's own. While all samples are drawn `loaded()` is entered, once."""

    draw: Draw
    protocol: Values
    facts: Values
    images: Callable[[Tensor], Tensor] = lambda images: images
    reseeded: Callable[[int], Draw] | None = None
    more: Callable[[], Mapping[str, Values | None]] = dict
    loaded: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Evaluator:
    """What all points of an evaluation share.

    `candidate(model, steps, guidance)` is asked for points that are not there yet. `reference` is the model and the
    number of steps that others are compared with, at the same guidance scale. `config` is the job's: its `eval` says
    in which batches images are drawn and how many are kept, its data hold the real images of distribution metrics.
    """

    config: Config
    run: Run
    candidate: Callable[[str, int, float], Candidate]
    prompts: PromptSet
    metrics: Mapping[str, Metric]
    scorer: ClipScorer | None
    reference: tuple[str, int]

    @cached_property
    def finished(self) -> Evaluation | None:
        """What a finished run of this or an earlier version holds already."""
        run = self.run
        return read_evaluation(run.path) if run.made(FILE) or run.made("results.json") else None

    def point(self, model: str, steps: int, guidance: float) -> Point:
        """A model at a setting, in evaluation/MODEL/guidance-G-steps-N.json."""
        if known := self.finished and self.finished.find(model, steps, guidance):
            return known
        key = model, steps, guidance
        value = self.run.json(place(*key), lambda: asdict(self.measured(key)))
        with damaged(self.run.path / place(*key)):
            return Point(**value)

    def measured(self, key: Key) -> Point:
        model, steps, guidance = key
        candidate, is_reference = self.candidate(*key), key[:2] == self.reference
        reference = self.reference_samples(guidance, candidate if is_reference else None)
        further = self.further_features(key, candidate)
        samples = reference if is_reference else self.draw(key, candidate)
        beside = None if is_reference or reference.shape != samples.shape else reference
        if pictures := self.config.eval.pictures:
            folder = f"images/{model}/steps-{steps}-guidance-{guidance}"
            self.run.folder(folder, lambda path: write_pictures(candidate.images(samples[:pictures]), path))
        metrics = self.measure(f"{model}, {steps} steps, guidance {guidance:g}", candidate, samples, beside)
        if further is not None:
            metrics["diversity"] = self.diversity(candidate, samples, further)
        metrics |= candidate.more()
        shuffled = {"against_shuffled": self.against_shuffled(candidate, samples)} if is_reference else {}
        return Point(model, steps, guidance, metrics, candidate.protocol, {**candidate.facts, **shuffled})

    def draw(self, key: Key, candidate: Candidate) -> Tensor:
        """Samples of all prompts, shared among the processes, on the CPU."""
        model, steps, guidance = key
        what, keep = f"{model}, {steps} steps, guidance {guidance:g}", f"{model}-{steps}-{guidance}"
        with candidate.loaded():
            return self.mapped(candidate.draw, f"images of {what}", self.run.path / PARTIAL / keep)

    def mapped(self, fn: Draw, what: str, keep: Path | None = None, count: int | None = None) -> Tensor:
        size = len(self.prompts) if count is None else count
        return map_batches(fn, size, self.config.eval.batch_size, self.run.accelerator, what, keep)

    def reference_samples(self, guidance: float, candidate: Candidate | None = None) -> Tensor:
        """What the reference draws, kept in a file."""
        key = (*self.reference, guidance)
        draw = lambda: self.draw(key, candidate or self.candidate(*key))  # noqa: E731
        return self.kept(f"guidance-{guidance}", "samples", draw)

    def kept(self, file: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that all processes make and one writes: reference/`file`.safetensors."""
        (tensor,) = self.run.tensors(f"reference/{file}.safetensors", lambda: {name: make()}).values()
        return tensor

    # ---- metrics ----

    def measure(self, what: str, candidate: Candidate, samples: Tensor, reference: Tensor | None) -> dict[str, Any]:
        """{metric: what it says}, all in one pass over the images; None for paired ones without a reference."""
        kinds: list[Kind] = ["per_image"] if reference is None else ["per_image", "paired"]
        scores = of_kind(self.metrics, *kinds)
        distances = {name: m for name, m in self.metrics.items() if isinstance(m, DistributionMetric)}
        texts = self.prompts.prompts
        for metric in scores.values():
            metric.prepare(texts)

        def rate(indices: list[int]) -> Tensor:
            """[B, scores + features of all distribution metrics]"""
            own, prompts = {"samples": samples[indices]}, [texts[i] for i in indices]
            own["images"] = candidate.images(own["samples"])
            other: dict[str, Tensor | None] = {"samples": None, "images": None}
            if reference is not None and of_kind(scores, "paired"):
                other = {"samples": reference[indices], "images": candidate.images(reference[indices])}
            columns = [m(own[m.reads], prompts, other[m.reads]).float().cpu()[:, None] for m in scores.values()]
            return torch.cat(columns + [m.features(own["images"]).float().cpu() for m in distances.values()], 1)

        values = self.mapped(rate, f"measuring {what}")
        found: dict[str, Values] = {
            name: self.score(m, column) for (name, m), column in zip(scores.items(), values.T, strict=False)
        }
        start = len(scores)
        for name, metric in distances.items():
            real_RD = self.real_features(name, metric)
            made_PD = values[:, start : start + real_RD.shape[1]]
            start += real_RD.shape[1]
            counts = {"n": len(made_PD), "n_real": len(real_RD)}
            found[name] = {"kind": metric.kind, **metric.distances(made_PD, real_RD), **counts}
        return {name: found.get(name) for name in self.metrics}

    def score(self, metric: Metric, values_P: Tensor) -> Values:
        """A value per distinct prompt, their mean and its error."""
        values = self.prompts.by_text(values_P).tolist()
        mean = mean_and_error(values)
        by_ratio = {"compared_by_ratio": True} if metric.compared_by_ratio else {}
        return {"kind": metric.kind, "mean": mean.mean, "se": mean.se, "per_prompt": values, **by_ratio}

    def further_features(self, key: Key, candidate: Candidate) -> Tensor | None:
        """[J, D] of the first prompts' images of further seeds, seed by seed, kept in a file; None where diversity is
        not measured."""
        config, scorer, reseeded = self.config.evaluation, self.scorer, candidate.reseeded
        if not config.diversity_prompts or reseeded is None:
            return None
        assert scorer, "load_scorer refuses diversity without a scorer"
        indices = first_of_texts(self.prompts, config.diversity_prompts)
        seeds = further_seeds(self.config.eval.seed, config.diversity_seeds)

        def features(items: list[int]) -> Tensor:
            drawn = [reseeded(seeds[k])([indices[j] for j in own]) for k, own in runs_of(items, len(indices))]
            return torch.cat([features_of(scorer, candidate.images(samples)).float().cpu() for samples in drawn])

        def make() -> dict[str, Tensor]:
            keep = self.run.path / PARTIAL / "-".join(map(str, (*key, "diversity")))
            count = len(indices) * len(seeds)
            with candidate.loaded():
                return {"features": self.mapped(features, f"further images of {key[0]}", keep, count)}

        return self.run.tensors(f"{place(*key).removesuffix('.json')}-diversity.safetensors", make)["features"]

    def diversity(self, candidate: Candidate, samples: Tensor, further_JD: Tensor) -> Values:
        """The mean distance of a prompt's images, the sample's and those of further seeds, for the first prompts."""
        assert (scorer := self.scorer), "there are features"
        indices = first_of_texts(self.prompts, self.config.evaluation.diversity_prompts)

        def features(items: list[int]) -> Tensor:
            return features_of(scorer, candidate.images(samples[[indices[j] for j in items]])).float()

        first_PD = self.mapped(features, "measuring diversity", count=len(indices))
        values = mean_pairwise_distance(features_PKD := stacked(first_PD, further_JD)).tolist()
        mean = mean_and_error(values)
        return {"kind": "per_prompt", "mean": mean.mean, "se": mean.se, "n": mean.n, "seeds": features_PKD.shape[1],
                "per_prompt": values}  # fmt: skip

    def real_features(self, name: str, metric: DistributionMetric) -> Tensor:
        """[R, D] of real images, kept in a file."""

        def features() -> Tensor:
            images, size = real_images(self.config), self.config.eval.batch_size
            if metric.of == "videos" and images.ndim == 4:
                images = images.movedim(1, -1)[:, None]  # an image is a video of one frame
            rate = lambda indices: metric.features(images[indices])  # noqa: E731
            return map_batches(rate, len(images), size, self.run.accelerator, f"{name} of real images")

        return self.kept(f"real-{name}", "features", features)

    def against_shuffled(self, candidate: Candidate, samples: Tensor) -> Values | None:
        """Whether the reference's images fit their prompts better than others' (eval/scorer_check.py); None where
        nothing says so, as of an unconditional model."""
        if (scorer := self.scorer) is None or "clip" not in self.metrics:
            return None
        rate = lambda indices: features_of(scorer, candidate.images(samples[indices])).float()  # noqa: E731
        return compare_teacher(rate, self.prompts, scorer, self.run.accelerator)

    # ---- all together ----

    def evaluate(
        self, points: Iterable[Point], models: Mapping[str, str], protocol: Values, seen: Values, **facts: Any
    ) -> Evaluation:
        """The points, paired with the reference at the same guidance scale: evaluation.json.

        What an earlier command of the run evaluated is returned as it is, or made again where other points are asked
        for now.
        """
        points, run = list(points), self.run
        if self.finished and [p.key for p in self.finished.points] == [p.key for p in points]:
            return self.finished
        base = {p.guidance: p for p in points if (p.model, p.steps) == self.reference}
        model, steps = self.reference
        if run.accelerator.is_main_process:
            (run.path / FILE).unlink(missing_ok=True)
        run.accelerator.wait_for_everyone()
        run.json(FILE, lambda: Evaluation(
            models=dict(models),
            reference={"model": model, "steps": steps},
            prompts=self.prompts.name,
            prompts_hash=self.prompts.hash,
            n=len(self.prompts.distinct),
            shown=self.prompts.prompts[: self.config.eval.pictures],
            protocol=protocol,
            points=tuple(compared(point, base[point.guidance]) for point in points),
            environment=environment(),
            seen=seen,
            facts=facts,
        ).as_json())  # fmt: skip
        evaluation = read_evaluation(run.path)
        assert evaluation, f"{run.path / FILE} was written"
        return evaluation


def place(model: str, steps: int, guidance: float) -> str:
    """The file of a point within its run."""
    return f"evaluation/{model}/guidance-{guidance}-steps-{steps}.json"


def compared(point: Point, reference: Point) -> Point:
    """The point with the paired differences of its scores of images and prompts; the reference itself has none."""

    def with_difference(name: str, own: Values | None) -> Values | None:
        return own and relative_to(None if point.key == reference.key else reference.metrics.get(name), own)

    return replace(point, metrics={name: with_difference(name, own) for name, own in point.metrics.items()})


def write_pictures(images_B3HW: Tensor, folder: Path) -> None:
    """The images as FOLDER/000.png, 001.png, …; of a video [F, H, W, 3] 000.webp, and beside it some of its frames."""
    for i, image in enumerate(images_B3HW):
        picture(image).save(folder / f"{i:03d}.png")
        if image.ndim == 4:
            write_animation([to_pil_image(frame) for frame in image.permute(0, 3, 1, 2)], folder / f"{i:03d}.webp")


def picture(image: Tensor) -> Image.Image:
    """An image [3, H, W], or of a video [F, H, W, 3] up to nine frames in a row, the first and the last among them."""
    if image.ndim == 3:
        return to_pil_image(image)
    at = torch.linspace(0, len(image) - 1, min(len(image), IN_A_ROW)).round().long()
    return to_pil_image(torch.cat([*image[at].permute(0, 3, 1, 2)], dim=2))
