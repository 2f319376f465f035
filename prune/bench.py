"""What the pruning job works with beside what every job does: the search, latencies, block scores, judgements."""

import logging
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from slimstep.engine.environment import environment
from slimstep.eval.bench import Bench, clip_line
from slimstep.eval.judge import clip_scores, draw_images, write_pictures
from slimstep.eval.metrics.clip import psnr
from slimstep.eval.metrics.compare import mean_and_error, paired_difference
from slimstep.eval.pages.cautions import score_cautions
from slimstep.eval.pages.comparison import run_table
from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.runs import read_run
from slimstep.eval.scorer_check import check_teacher
from slimstep.eval.timing.latency import compare_ms
from slimstep.models.cost import count_gflops
from slimstep.models.denoiser import guidance_embed_dim
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import export_pipeline, with_unet
from slimstep.prune.latency import latency_table, predicted_ms, read_table, table_without
from slimstep.prune.scores import score_blocks

log = logging.getLogger("slimstep")


class PruneBench(Bench):
    """What pruning adds: the search, latencies, block scores, and the judgement of its outcome."""

    @cached_property
    def search(self):
        """The way an architecture is chosen: prune/search.py."""
        return self.component("search.method", _convert_="all")

    def check(self) -> None:
        """ValueError, before anything is made, for a search, data, objectives or a scorer that will not do."""
        if guidance_embed_dim(self.teacher):
            raise ValueError(f"{self.config.model.name_or_path} is told its guidance scale: prune it before that")
        known = (*self.teacher.blocks, *self.teacher.levels)
        if unknown := sorted(set(self.search.named_blocks) - set(known)):
            raise ValueError(f"search.method names unknown blocks {unknown}; this network has {known}")
        if (decided := getattr(self.search, "skip_rule", None)) not in (None, self.skip_rule):
            raise ValueError(f"search.method.architecture was decided with search.skip_rule={decided}; set it here")
        if self.known_latencies:
            table_without(self.known_latencies, self.teacher)
        with torch.device("meta"):
            bare = PrunableUNet2DConditionModel.from_config(dict(self.teacher.config), bypass=self.skip_rule)
            PrunableUNet2DConditionModel.from_config(dict(bare.config), depths=getattr(self.search, "architecture", {}))
        for key, stage in {"objective": self.config, "recovery.objective": self.config.recovery}.items():
            self.check_objective(key, stage.objective, stage.train)
        self.check_inputs()
        if self.search.needs_scores:
            self.sampler(self.config.scoring)

    @property
    def skip_rule(self) -> str | dict[str, str]:
        """What is left of removed ResNets, as search.skip_rule says."""
        rule = self.config.search.skip_rule
        return OmegaConf.to_container(rule) if OmegaConf.is_config(rule) else rule

    def student(self) -> PrunableUNet2DConditionModel:
        """A trainable copy of the teacher, in float32."""
        return PrunableUNet2DConditionModel.from_unet(self.teacher, skip_rule=self.skip_rule).float().requires_grad_()

    @cached_property
    def known_latencies(self) -> dict | None:
        """The table of the teacher that the configuration names, if it names one."""
        return read_table(self.config.latency.table) if self.config.latency.table else None

    def measure_latencies(self, unet: PrunableUNet2DConditionModel) -> dict:
        """The latency table of `unet`: measured by rank 0 for all, or taken from the table there is."""
        if self.known_latencies:
            return table_without(self.known_latencies, unet)
        table = latency_table(unet, self.latency, self.device) if self.run.accelerator.is_main_process else None
        table = self.run.agreed(table)
        error = table["additive_error"]
        say = log.warning if error["median"] > 0.1 else log.info
        say(
            f"latency table ({table['method']}, {table['mode']}): {table['full_ms']:.2f} ms; sums of its entries miss "
            f"the measured time by {error['median']:.1%} (median), {error['p95']:.1%} (95 %) on {error['n']} removals"
        )
        return table

    def score(self, unet: PrunableUNet2DConditionModel, stage: str) -> dict:
        """The block scores of `unet` with their protocol."""
        scoring, prompts = self.config.scoring, self.prompts[0]
        sampler = self.sampler(scoring)
        table = score_blocks(unet, sampler, self.scorer, prompts, scoring.batch_size, self.run.accelerator,
                             keep=self.partial(stage))  # fmt: skip
        asked = {"name": scoring.protocol, "prompts_hash": prompts.hash, "n": len(prompts.distinct)}
        record = table.record({**asked, **self.scorer.protocol, **sampler.protocol})
        log.info(
            f"CLIP {record['base']['clip']:.2f} ± {record['base']['se']:.2f}; two halves of the prompts rank the "
            f"blocks alike with ρ = {record['rank_agreement_of_halves']:.2f}"
        )
        for doubt in score_cautions(record):
            log.warning(f"{stage}: {doubt}")
        return record

    def measure_ms(self, unet: PrunableUNet2DConditionModel, teacher_ms: float) -> float:
        """The latency of `unet` on the teacher's clock: the ratio of the two, interleaved, times `teacher_ms`.

        Timed by rank 0 alone; predicted where the table was made elsewhere.
        """
        if self.known_latencies:
            return predicted_ms(self.known_latencies, unet)
        unets = {"teacher": self.teacher, "unet": unet}
        times = compare_ms(unets, self.latency, self.device) if self.run.accelerator.is_main_process else None
        times = self.run.agreed(times)
        return teacher_ms * times["unet"] / times["teacher"]

    def export(self, student: PrunableUNet2DConditionModel, name: str = "export") -> None:
        """A student as a diffusers folder; verdict.json in it says how it loads."""

        def write(folder: Path) -> None:
            export = export_pipeline(with_unet(self.pipeline, student), folder, origin=self.origin(self.config.eval))
            log.info(f"exported: {export.load}")

        self.run.sealed_folder(name, write)

    def keep_prompts(self) -> None:
        """What blocks are ranked on, and what the outcome is judged on: prompts.json."""
        ranked_on, judged_on = (list(prompts.distinct) for prompts in self.prompts)
        asked = {"ranked_on": ranked_on if self.search.needs_scores else [], "judged_on": judged_on}
        self.run.json("prompts.json", lambda: asked)

    @cached_property
    def teacher_images(self) -> Tensor:
        """The teacher's uint8 images of the prompts that the outcome is judged on."""
        return self.draw("teacher", self.teacher)

    def draw(self, name: str, unet: PrunableUNet2DConditionModel) -> Tensor:
        config, accelerator, keep = self.config.eval, self.run.accelerator, self.partial(name)
        return draw_images(name, unet, self.sampler(config), self.prompts[1], config.batch_size, accelerator, keep)

    def judge(self, name: str, unet: PrunableUNet2DConditionModel) -> dict:
        """Scores on prompts that nothing is ranked on, in `judged/<name>.json`; pictures in `images/<name>`."""
        config, prompts = self.config.eval, self.prompts[1]

        def make() -> dict:
            images = self.teacher_images if unet is self.teacher else self.draw(name, unet)
            text = self.scorer.text(prompts.prompts)
            scores_P = clip_scores(images, text, self.scorer, config.batch_size, self.run.accelerator)
            scores = prompts.by_text(scores_P).tolist()
            self.run.folder(f"images/{name}", lambda folder: write_pictures(images[: config.pictures], folder))
            clip = mean_and_error(scores)
            return {
                "name": name,
                "parameters": unet.num_parameters(),
                "gflops": count_gflops(unet, tokens=self.text_length),
                "clip": {"mean": clip.mean, "se": clip.se, "per_prompt": scores},
                "psnr_to_teacher": None if unet is self.teacher else psnr(images, self.teacher_images).mean().item(),
                **({"against_shuffled": check_teacher(self, images, prompts)} if unet is self.teacher else {}),
            }

        return self.run.json(f"judged/{name}.json", make)

    def evaluate(self, judged: list[dict], measured_ms: dict[str, float]) -> dict:
        """Every judged model beside the first, the teacher, paired by prompt: evaluation.json."""
        prompts, teacher = self.prompts[1], judged[0]

        def versus(model: dict) -> dict:
            return asdict(paired_difference(model["clip"]["per_prompt"], teacher["clip"]["per_prompt"]))

        def make() -> dict:
            self.run.json("images/prompts.json", lambda: list(prompts.prompts[: self.config.eval.pictures]))
            models = [{**model, "ms": measured_ms[model["name"]],
                       "versus_teacher": None if model is teacher else versus(model)} for model in judged]  # fmt: skip
            return {
                "prompts": prompts.name,
                "prompts_hash": prompts.hash,
                "n": len(prompts.distinct),
                **self.seen_prompts,
                "protocol": {**self.scorer.protocol, **self.sampler(self.config.eval).protocol},
                "models": models,
                "environment": environment(),
            }

        return self.run.json("evaluation.json", make)

    def write_card(self, evaluation: dict) -> None:
        """The student's scores and milliseconds, into its model card."""
        teacher, student = evaluation["models"][0], evaluation["models"][-1]
        config, device = self.config.latency, evaluation["environment"]["device"]
        times = f"UNet: {student['ms']:.2f} ms, the teacher's {teacher['ms']:.2f} ms, for a batch of {config.batch}"
        clock = f"by the table {config.table}" if self.known_latencies else f"measured on {device}"
        self.card("export", [clip_line(student["clip"], student["versus_teacher"]), f"{times} ({clock})"])

    def report(self) -> None:
        """report.html and its pictures, once; the same to the tracker; the table is printed."""
        page, new = self.run.path / "report.html", not self.run.made("report.html")
        if self.run.accelerator.is_main_process:
            if new:
                self.track()
                write_report(self.run.path)
                shutil.rmtree(self.partial(""), ignore_errors=True)
            print(run_table(self.run.path))
            log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
        self.run.accelerator.wait_for_everyone()

    def track(self) -> None:
        """Block values as tables and the pictures of every model, for a tracker if there is one."""
        record, tracker = read_run(self.run.path), self.run.tracker
        if tracker is None:
            return
        for r in record.rounds:
            rows = [[b.path, b.ms, b.delta_clip, b.se, b.clip_per_ms] for b in r.blocks.values()]
            tracker.table(f"{r.name}/blocks", ["block", "ms", "CLIP lost", "se", "CLIP lost per ms"], rows)
        for name, paths in record.images.items():
            tracker.images(f"images/{name}", [Image.open(path) for path in paths], list(record.prompts))
