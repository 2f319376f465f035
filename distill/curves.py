"""What a ladder has reached: every student at many numbers of steps and guidance scales, beside its teacher.

Axes: P prompts, C channels, H and W latent size, D features.
"""

from dataclasses import asdict, dataclass, replace

import diffusers
import torch
from torch import Tensor

from distill.bench import DistillBench
from engine.environment import environment
from engine.parallel import map_batches
from eval.clip import psnr
from eval.compare import mean_and_error, paired_difference
from eval.judge import write_pictures
from eval.latency import compare_ms
from eval.sampling import Sampler
from models.unet import PrunableUNet2DConditionModel


@dataclass(frozen=True)
class Judged:
    """A network and what it is sampled with."""

    name: str
    unet: PrunableUNet2DConditionModel
    scheduler: object


class Curves:
    """The judgement of the teacher (DDIM, and DPM++ 2M, what a user would pick) and of every student.

    All start from the same noise per prompt; distances are to the teacher's DDIM images at the most steps and the same
    guidance scale. One file per model, guidance scale and number of steps: a killed judgement goes on.
    """

    def __init__(self, bench: DistillBench):
        self.bench, self.config, self.prompts = bench, bench.config.eval, bench.prompts[1]
        self.most_steps = max(bench.config.curves.steps)
        self._references: dict[float, Tensor] = {}

    @property
    def judged(self) -> list[Judged]:
        bench = self.bench
        ddim = bench.teacher_scheduler
        solver = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config)
        students = [climb.name for climb in bench.climbs if climb.name.startswith("steps-")]
        return [
            Judged("teacher", bench.teacher, ddim),
            Judged("teacher-dpm", bench.teacher, solver),
            *(Judged(name, bench.networks[name], bench.student_scheduler()) for name in students),
        ]

    def sampler(self, model: Judged, steps: int, guidance: float) -> Sampler:
        return Sampler(self.bench.pipeline, steps, guidance, self.config.seed, model.scheduler)

    def latents(self, model: Judged, steps: int, guidance: float) -> Tensor:
        """float32 [P, C, H, W] on the CPU, shared among the processes."""
        sampler, prompts, bench = self.sampler(model, steps, guidance), self.prompts.prompts, self.bench
        name = f"{model.name}-{steps}-{guidance}"

        def draw(indices: list[int]) -> Tensor:
            noise = torch.stack([sampler.noise(i) for i in indices])
            draws = sampler.generators(indices)
            return sampler.latents(model.unet, sampler.encode(prompts).rows(indices), noise, generators=draws).float()

        return map_batches(draw, len(prompts), self.config.batch_size, bench.run.accelerator,
                           f"{model.name}, {steps} steps, guidance {guidance}", bench.partial(name))  # fmt: skip

    def reference(self, guidance: float) -> Tensor:
        """The teacher's latents at the most steps."""
        if guidance not in self._references:
            self._references[guidance] = self.latents(self.judged[0], self.most_steps, guidance)
        return self._references[guidance]

    def record(self, model: Judged, steps: int, guidance: float) -> dict:
        """One point of the curves, made once."""
        return self.bench.run.json(
            f"judged/{model.name}/steps-{steps}-guidance-{guidance}.json", lambda: self.judge(model, steps, guidance)
        )

    def judge(self, model: Judged, steps: int, guidance: float) -> dict:
        bench, sampler, scorer = self.bench, self.sampler(model, steps, guidance), self.bench.scorer
        reference = self.reference(guidance)
        is_reference = model.name == "teacher" and steps == self.most_steps
        latents = reference if is_reference else self.latents(model, steps, guidance)
        text_PD = scorer.text(self.prompts.prompts)

        def rate(indices: list[int]) -> Tensor:
            image, wanted = sampler.decode(latents[indices]), sampler.decode(reference[indices])
            near = (scorer.image(image) * scorer.image(wanted)).sum(1)
            error = (latents[indices] - reference[indices]).square().mean((1, 2, 3))
            return torch.stack([scorer.score(image, text_PD[indices]), psnr(image, wanted), near, error], 1).cpu()

        what = f"judging {model.name}"
        values = map_batches(rate, len(latents), self.config.batch_size, bench.run.accelerator, what)
        clip, decibels, near, error = (self.prompts.by_text(column) for column in values.T)
        folder = f"images/{model.name}/steps-{steps}-guidance-{guidance}"
        bench.run.folder(folder, lambda path: write_pictures(sampler.decode(latents[: self.config.pictures]), path))
        score = mean_and_error(clip.tolist())
        return {
            "model": model.name,
            "scheduler": type(model.scheduler).__name__,
            "steps": steps,
            "guidance": guidance,
            "evaluations": steps * (2 if sampler.guides(model.unet) else 1),
            "clip": {"mean": score.mean, "se": score.se, "per_prompt": clip.tolist()},
            "psnr_to_teacher": None if is_reference else decibels.mean().item(),
            "feature_cosine_to_teacher": near.mean().item(),
            "latent_error_to_teacher": {"mean": error.mean().item(), "per_prompt": error.tolist()},
        }

    def measure_unets(self) -> None:
        """unet_ms.json: {rows: {network: ms}} of one evaluation of one row and of two, interleaved, by rank 0."""
        bench = self.bench

        def make() -> dict:
            unets = {model.name: model.unet for model in self.judged if model.name != "teacher-dpm"}
            return {rows: compare_ms(unets, replace(bench.latency, batch=rows), bench.device) for rows in (1, 2)}

        bench.run.json("unet_ms.json", lambda: make() if bench.run.accelerator.is_main_process else None)

    def evaluate(self) -> dict:
        """All points, paired by prompt with the teacher at its most steps and the same guidance: evaluation.json."""
        bench, curves = self.bench, self.bench.config.curves
        points = [
            self.record(model, steps, guidance)
            for guidance in curves.guidance for model in self.judged for steps in sorted(curves.steps, reverse=True)
        ]  # fmt: skip
        teachers = {p["guidance"]: p for p in points if p["model"] == "teacher" and p["steps"] == self.most_steps}

        def versus(point: dict) -> dict:
            teacher = teachers[point["guidance"]]
            return asdict(paired_difference(point["clip"]["per_prompt"], teacher["clip"]["per_prompt"]))

        return bench.run.json(
            "evaluation.json",
            lambda: {
                "prompts": self.prompts.name,
                "prompts_hash": self.prompts.hash,
                "n": len(self.prompts.distinct),
                "protocol": {**bench.scorer.protocol, "seed": self.config.seed},
                "points": [{**point, "versus_teacher": versus(point)} for point in points],
                "environment": environment(),
            },
        )
