"""What a ladder has reached: every student at many numbers of steps and guidance scales, beside its teacher.

Axes: P prompts, C channels, H and W latent size, D features.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimstep.distill.bench import DistillBench
from slimstep.engine.environment import environment
from slimstep.engine.files import damaged, write_tensors
from slimstep.engine.parallel import map_batches
from slimstep.eval.judge import write_pictures
from slimstep.eval.metrics.clip import psnr
from slimstep.eval.metrics.compare import mean_and_error, paired_difference, paired_ratio
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import compare_teacher
from slimstep.eval.timing.latency import compare_ms
from slimstep.models.conditioning import Conditioning
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import on_device

SAMPLERS, EVALUATION = ("teacher", "teacher-dpm"), "evaluation.json"


@dataclass(frozen=True)
class Judged:
    """A network and what it is sampled with."""

    name: str
    unet: PrunableUNet2DConditionModel
    scheduler: object


class Curves:
    """The judgement of the teacher (DDIM, and DPM++ 2M, what a user would pick) and of every student.

    All start from the same noise per prompt; distances are to the reference, the teacher's DDIM latents at the ladder's
    first number of steps and the same guidance scale. One file per model, guidance scale and number of steps: a killed
    judgement goes on.
    """

    def __init__(self, bench: DistillBench):
        self.bench, self.config, self.prompts = bench, bench.config.eval, bench.prompts[1]
        self.reference_steps = bench.ladder.steps[0]
        self._references: dict[float, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """The models that are judged, in order: the teacher's samplers, the teacher that learnt v, the students."""
        velocity = [] if self.bench.predicts_velocity else ["teacher-v"]
        return [*SAMPLERS, *velocity, *(c.name for c in self.bench.climbs if c.name.startswith("steps-"))]

    @cached_property
    def judged(self) -> list[Judged]:
        bench = self.bench
        ddim = bench.pipeline.scheduler
        solver = bench.on_the_grid(diffusers.DPMSolverMultistepScheduler, ddim)
        teachers = {
            "teacher": (bench.teacher, ddim),
            "teacher-dpm": (bench.teacher, solver),
            "teacher-v": (bench.networks["teacher"], bench.scheduler),
        }
        return [Judged(n, *(teachers.get(n) or (bench.networks[n], bench.student_scheduler))) for n in self.names]

    def steps(self, name: str) -> list[int]:
        """At which a model is judged, most first; the teacher at the reference's, too."""
        more = {self.reference_steps} if name == "teacher" else set()
        return sorted({*self.bench.config.curves.steps, *more}, reverse=True)

    @cached_property
    def encoded(self) -> Conditioning:
        return self.sampler(self.judged[0], 1, 1.0).encode(self.prompts.prompts)

    @cached_property
    def text_features_PD(self) -> Tensor:
        return self.bench.scorer.text(self.prompts.prompts)

    def sampler(self, model: Judged, steps: int, guidance: float) -> Sampler:
        bench = self.bench
        return Sampler(bench.pipeline, steps, guidance, self.config.seed, model.scheduler, bench.precision)

    def latents(self, model: Judged, steps: int, guidance: float) -> Tensor:
        """float32 [P, C, H, W] on the CPU, shared among the processes."""
        sampler, bench = self.sampler(model, steps, guidance), self.bench

        def draw(indices: list[int]) -> Tensor:
            noise, draws = torch.stack([sampler.noise(i) for i in indices]), sampler.generators(indices)
            return sampler.latents(unet, self.encoded.rows(indices), noise, generators=draws).float()

        what, keep = f"{model.name}, {steps} steps, guidance {guidance:g}", f"{model.name}-{steps}-{guidance}"
        size, accelerator = len(self.prompts.prompts), bench.run.accelerator
        with on_device(model.unet, bench.device) as unet:
            return map_batches(draw, size, self.config.batch_size, accelerator, what, bench.partial(keep))

    def reference(self, guidance: float) -> Tensor:
        """The latents that distances are to, kept in a file."""
        if guidance not in self._references:
            run, file = self.bench.run, f"reference/guidance-{guidance}.safetensors"
            if not run.made(file):
                latents = self.latents(self.judged[0], self.reference_steps, guidance)
                if run.accelerator.is_main_process:
                    write_tensors(run.path / file, {"latents": latents})
                run.accelerator.wait_for_everyone()
            with damaged(run.path / file):
                self._references[guidance] = load_file(run.path / file)["latents"]
        return self._references[guidance]

    def record(self, model: Judged, steps: int, guidance: float) -> dict:
        """One point of the curves, made once."""
        return self.bench.run.json(
            f"judged/{model.name}/steps-{steps}-guidance-{guidance}.json", lambda: self.judge(model, steps, guidance)
        )

    def judge(self, model: Judged, steps: int, guidance: float) -> dict:
        bench, sampler, scorer = self.bench, self.sampler(model, steps, guidance), self.bench.scorer
        reference = self.reference(guidance)
        is_reference = model.name == "teacher" and steps == self.reference_steps
        latents = reference if is_reference else self.latents(model, steps, guidance)

        def rate(indices: list[int]) -> Tensor:
            image, wanted = sampler.decode(latents[indices]), sampler.decode(reference[indices])
            own = scorer.image(image)
            near = (own * scorer.image(wanted)).sum(1)
            error = (latents[indices] - reference[indices]).square().mean((1, 2, 3))
            columns = scorer.similarity(own, self.text_features_PD[indices]), psnr(image, wanted), near, error
            told = torch.stack([column.float().cpu() for column in columns], 1)
            return torch.cat([told, own.float().cpu()], 1) if is_reference else told

        what = f"judging {model.name}"
        values = map_batches(rate, len(latents), self.config.batch_size, bench.run.accelerator, what)
        clip, decibels, near, error = (self.prompts.by_text(column) for column in values[:, :4].T)
        folder = f"images/{model.name}/steps-{steps}-guidance-{guidance}"
        bench.run.folder(folder, lambda path: write_pictures(sampler.decode(latents[: self.config.pictures]), path))
        score = mean_and_error(clip.tolist())
        return {
            "model": model.name,
            "steps": steps,
            "guidance": guidance,
            "protocol": sampler.protocol,
            "evaluations": sampler.evaluations(model.unet),
            "clip": {"mean": score.mean, "se": score.se, "per_prompt": clip.tolist()},
            "psnr_to_teacher": None if is_reference else decibels.mean().item(),
            "feature_cosine_to_teacher": near.mean().item(),
            "latent_error_to_teacher": {"mean": error.mean().item(), "per_prompt": error.tolist()},
            **({"against_shuffled": compare_teacher(values[:, 4:], self.prompts, scorer)} if is_reference else {}),
        }

    def measure_unets(self) -> None:
        """unet_ms.json: {rows: {network: ms}} of evaluations of one row and of two, interleaved; rank 0 alone."""
        bench = self.bench

        def make() -> dict:
            unets = {model.name: model.unet for model in self.judged if model.name != "teacher-dpm"}
            ms = {rows: compare_ms(unets, replace(bench.latency, batch=rows), bench.device) for rows in (1, 2)}
            return {"ms": ms, "protocol": asdict(bench.latency), "environment": environment()}

        run = bench.run
        run.json("unet_ms.json", lambda: run.agreed(make() if run.accelerator.is_main_process else None))

    def forget_other_points(self, keys: list[tuple]) -> None:
        """What sums up a ladder that has grown since, or was judged at fewer points, is made again."""
        run = self.bench.run
        if run.accelerator.is_main_process and (run.path / EVALUATION).exists():
            there = [point_key(point) for point in run.load(EVALUATION)["points"]]
            if there != keys:
                for name in ("unet_ms.json", EVALUATION):
                    (run.path / name).unlink(missing_ok=True)
        run.accelerator.wait_for_everyone()

    def evaluate(self) -> dict:
        """All points, paired by prompt with the reference, and with the teacher at as many steps: evaluation.json."""
        bench, curves = self.bench, self.bench.config.curves
        points = [
            self.record(model, steps, guidance)
            for guidance in curves.guidance for model in self.judged for steps in self.steps(model.name)
        ]  # fmt: skip
        self.forget_other_points([point_key(point) for point in points])
        by_key = {point_key(point): point for point in points}

        def versus(point: dict) -> dict:
            teacher = by_key["teacher", self.reference_steps, point["guidance"]]
            return asdict(paired_difference(point["clip"]["per_prompt"], teacher["clip"]["per_prompt"]))

        def nearness(point: dict, sampler: str) -> dict | None:
            other, key = by_key.get((sampler, *point_key(point)[1:])), "latent_error_to_teacher"
            if other is None or not other[key]["mean"]:
                return None
            return asdict(paired_ratio(point[key]["per_prompt"], other[key]["per_prompt"]))

        return bench.run.json(
            EVALUATION,
            lambda: {
                "prompts": self.prompts.name,
                "prompts_hash": self.prompts.hash,
                "n": len(self.prompts.distinct),
                **bench.seen_prompts,
                "protocol": {**bench.scorer.protocol, "seed": self.config.seed},
                "points": [
                    {
                        **point,
                        "versus_teacher": versus(point),
                        "latent_error_over": {name: nearness(point, name) for name in SAMPLERS},
                    }
                    for point in points
                ],
                "environment": environment(),
            },
        )


def point_key(point: dict) -> tuple[str, int, float]:
    return point["model"], point["steps"], point["guidance"]
