"""What the decoder job works with beside what every job does: the narrow decoder, its latents, its judgement.

Axes: P latents, C channels, H and W height and width.
"""

import copy
import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from slimstep.data.encoding import encode_images
from slimstep.data.images import BrokenImageError
from slimstep.data.latents import LatentMix
from slimstep.data.prompts import PromptSet, heldout_prompts, read_prompts
from slimstep.data.streams import at_random_access
from slimstep.engine.components import check, component
from slimstep.engine.environment import environment
from slimstep.engine.files import damaged, write_tensors
from slimstep.engine.objective import Objective, check_requirements
from slimstep.engine.parallel import map_batches
from slimstep.engine.seeding import generator
from slimstep.eval.bench import Bench, clip_line
from slimstep.eval.config import LatentsConfig
from slimstep.eval.decoders import NEARNESS, compare_decoders, nearness
from slimstep.eval.judge import clip_scores, write_pictures
from slimstep.eval.latents import sampled_latents
from slimstep.eval.metrics.compare import mean_and_error, paired_difference
from slimstep.eval.pages.vae_page import HEADER, quality_rows, vae_table, write_vae_report
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import check_teacher
from slimstep.models.cost import count_parameters
from slimstep.models.decoding import ImageDecoder, has_statistics
from slimstep.models.pipeline import export_pipeline, with_unet
from slimstep.models.vae import NarrowAutoencoderKL
from slimstep.prune.config import DecoderConfig
from slimstep.prune.decoder import CHOICES, NORM_GROUPS, choose_channels, narrow_widths, narrowed

log = logging.getLogger("slimstep")
HELDOUT = "heldout.safetensors"


class VaeBench(Bench):
    """The wide decoder is the pipeline's, frozen; the narrow one is made from it."""

    @cached_property
    def decoder(self) -> DecoderConfig:
        return OmegaConf.to_object(self.config.decoder)

    @cached_property
    def latents(self) -> LatentsConfig:
        return OmegaConf.to_object(self.config.latents)

    @cached_property
    def pipeline(self):
        """The teacher pipeline, its VAE in float32: there it is sliced, and taught from."""
        pipeline = super().pipeline
        pipeline.vae.float()
        return pipeline

    @property
    def wide(self) -> AutoencoderKL:
        return self.pipeline.vae

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return narrow_widths(self.wide, self.decoder.width, self.decoder.norm_groups)

    def check(self) -> None:
        """ValueError, before anything is made, for a decoder, widths, data or an objective that will not do."""
        if type(self.wide) is not AutoencoderKL:
            kind = type(self.wide).__name__
            raise ValueError(f"the model's VAE is {kind}; a decoder is narrowed from diffusers' own AutoencoderKL")
        if self.decoder.norm_groups not in NORM_GROUPS:
            raise ValueError(f"decoder.norm_groups={self.decoder.norm_groups!r} is unknown; choose from {NORM_GROUPS}")
        _ = self.widths
        if self.decoder.choice not in CHOICES:
            raise ValueError(f"decoder.choice={self.decoder.choice!r} is unknown; choose from {CHOICES}")
        check(self.config.objective, "objective")
        check_requirements(self.objective(self.config.objective), self.config.train, self.run.accelerator)
        if self.latency.iterations < 2:
            raise ValueError("latency.iterations=1: a ratio is told with its quartiles, of 2 timings and more")
        self.check_inputs()
        self.sampler(self.latents)
        if len(self.heldout_pairs) < 2:
            told = f"the data hold {len(self.heldout_pairs)} held-out images; a decoder is judged on 2 and more"
            raise ValueError(f"{told}: a higher data.heldout_fraction")
        if self.trains_on_prompts:
            _ = self.training_prompts

    # ---- latents ----

    @cached_property
    def training_prompts(self) -> PromptSet:
        """The captions of training images, or those of a file."""
        asked = self.latents
        if asked.prompt_file:
            prompts = read_prompts(asked.prompt_file, asked.prompt_column, "latents.prompt_column")
            return prompts.take(asked.prompts, way=f"latents.prompts={len(prompts)} or fewer, or a longer file")
        return heldout_prompts(self.component("data.pairs"), asked.prompts, name="training captions")

    @property
    def trains_on_prompts(self) -> bool:
        """Whether any latents are sampled; else all are those of images."""
        return self.parts(self.latents.rounds - 1)[0] > 0

    def training_captions(self) -> Iterable[str]:
        return self.training_prompts if self.trains_on_prompts else ()

    def parts(self, r: int) -> tuple[int, int]:
        """How many sampled latents and how many encoded images round r learns from."""
        asked = self.latents
        total = -(-asked.count * (r + 1) // asked.rounds)
        real = round(total * asked.real_share)
        return total - real, real

    def samples(self, objective: Objective | None, stage: str) -> LatentMix:
        """What a round learns from: its sampled latents, from the cache or made now, and its encoded images."""
        num_sampled, num_real = self.parts(int(stage.removeprefix("round-")))
        sampled = self.sampled(num_sampled) if num_sampled else ()
        real = self.pairs if num_real else ()
        return LatentMix(sampled, num_sampled, real, num_real)

    @property
    def idle(self) -> list[nn.Module]:
        """The wide decoder that teaches is a copy."""
        return [*super().idle, self.teacher]

    def sampled(self, count: int) -> Dataset:
        """At least so many latents of the teacher."""
        folder, batch_size = Path(self.config.data.cache.folder), self.latents.batch_size
        self.pipeline.to(self.device)
        sampler, prompts, accelerator = self.sampler(self.latents), self.training_prompts, self.run.accelerator
        return sampled_latents(sampler, self.teacher, prompts, count, batch_size, folder, accelerator)

    @cached_property
    def heldout_pairs(self) -> Dataset:
        """Images that nothing is trained on."""
        held = component(OmegaConf.merge(self.config, {"data": {"pairs": {"split": "heldout"}}}), "data.pairs")
        return at_random_access(held, self.config.eval.prompts)

    @cached_property
    def heldout(self) -> dict[str, Tensor]:
        """What decoders are judged on: `sampled` latents of the evaluation's prompts, `real` ones of
        held-out images, and those images, uint8 [P, 3, H, W]."""
        run, config, prompts = self.run, self.config.eval, self.prompts[1]
        if not run.made(HELDOUT):
            real = self.heldout_images(len(prompts)) if run.accelerator.is_main_process else {}
            self.pipeline.to(self.device)
            sampler = self.sampler(config)

            def draw(indices: list[int]) -> Tensor:
                cond = sampler.encode(prompts.prompts).rows(indices)
                noise, draws = torch.stack([sampler.noise(i) for i in indices]), sampler.generators(indices)
                return sampler.latents(self.teacher, cond, noise, generators=draws).float()

            size, keep = len(prompts), self.partial("heldout")
            sampled = map_batches(draw, size, config.batch_size, run.accelerator, "held-out latents", keep)
            if run.accelerator.is_main_process:
                write_tensors(run.path / HELDOUT, {"sampled": sampled, **real})
            run.accelerator.wait_for_everyone()
        with damaged(run.path / HELDOUT):
            return load_file(run.path / HELDOUT)

    def heldout_images(self, count: int) -> dict[str, Tensor]:
        """Up to `count` held-out images that can be read, in a fixed shuffled order, and their latents."""
        order = torch.randperm(len(self.heldout_pairs), generator=generator("held-out images")).tolist()
        images = []
        for index in order:
            try:
                images.append(self.heldout_pairs[index]["image"])
            except BrokenImageError as error:
                log.warning(f"left out: {error}")
            if len(images) == count:
                break
        if len(images) < 2:
            told = f"{len(images)} held-out images can be read; a decoder is judged on 2 and more"
            raise ValueError(f"{told}: repair them, or a higher data.heldout_fraction")
        images_P3HW = torch.stack(images)
        latents = [
            encode_images(self.pipeline, batch, self.device)["latents"].float().cpu()
            for batch in images_P3HW.split(self.config.data.cache.batch_size)
        ]
        return {"real": torch.cat(latents), "images": images_P3HW}

    # ---- the narrow decoder ----

    def sliced(self) -> NarrowAutoencoderKL:
        """The chosen channels of the wide decoder, untrained; the choice is in channels.json."""
        asked, run, widths = self.decoder, self.run, self.widths
        if not run.made("channels.json"):
            latents = self.first_latents() if asked.choice in ("taylor", "energy") else None

        def choose() -> dict:
            return choose_channels(
                self.wide, widths, asked.choice, latents, run.seed, asked.norm_groups, has_statistics(self.pipeline)
            )

        channels = run.json("channels.json", lambda: choose() if run.accelerator.is_main_process else None)
        log.info(f"decoder: {tuple(self.wide.config.block_out_channels)} → {widths} channels, by {asked.choice}")
        with damaged(run.path / "channels.json"):
            return narrowed(self.wide, channels, widths, asked.norm_groups)

    def first_latents(self) -> Tensor:
        """What channels are chosen by: the first latents that training sees."""
        mix = self.samples(None, "round-00")
        return torch.stack([mix[i]["latents"] for i in range(min(self.decoder.samples, len(mix)))])

    def distil(self, sliced: NarrowAutoencoderKL) -> NarrowAutoencoderKL:
        """Trained round by round, each a training of its own on more latents; a finished round is loaded."""
        narrow = copy.deepcopy(sliced).requires_grad_(False)
        student = ImageDecoder(narrow, has_statistics(self.pipeline))
        student.decoder.requires_grad_(True)
        for r in range(self.latents.rounds):
            self.train(student, self.config.objective, self.config.train, f"round-{r:02d}")
        return narrow.requires_grad_(False).eval()

    def objective(self, config, **given) -> Objective:
        """The loss, with the wide decoder as training runs it. ValueError where its arguments will not do."""
        # Autoencoders are known to overflow in float16: there the wide one stays in float32.
        dtype = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32
        wide = ImageDecoder(copy.deepcopy(self.wide), has_statistics(self.pipeline)).to(self.device, dtype)
        if self.config.train.channels_last:
            wide.to(memory_format=torch.channels_last)
        if self.config.train.compile:
            wide.compile(dynamic=False)
        return self.made_objective(config, wide=wide, **given)

    # ---- what it is worth ----

    def sampler_with(self, vae: nn.Module) -> Sampler:
        """The pipeline's sampler around another VAE."""
        config = self.config.eval
        pipeline = with_unet(self.pipeline, self.teacher, vae=vae)
        settings = config.steps, config.guidance_scale, config.seed
        return Sampler(pipeline, *settings, precision=self.precision)

    def decoded(self, name: str, vae: AutoencoderKL) -> dict[str, Tensor]:
        """uint8 images [P, 3, H, W] of the held-out latents, sampled and real."""
        decode, batch_size = self.sampler_with(vae).decode, self.config.eval.batch_size

        def images(kind: str) -> Tensor:
            latents, keep = self.heldout[kind], self.partial(f"{name}-{kind}")
            what = f"{name}: images of {kind} latents"
            return map_batches(
                lambda indices: decode(latents[indices]), len(latents), batch_size, self.run.accelerator, what, keep
            )

        return {kind: images(kind) for kind in ("sampled", "real")}

    @cached_property
    def wide_images(self) -> dict[str, Tensor]:
        return self.decoded("wide", self.wide)

    def judge(self, name: str, vae: AutoencoderKL) -> dict:
        """Its images beside the wide decoder's and beside real ones, and their CLIP scores: `judged/<name>.json`."""
        run, config, prompts, scorer = self.run, self.config.eval, self.prompts[1], self.scorer
        is_wide = vae is self.wide

        def near(images: Tensor, wanted: Tensor) -> Tensor:
            def rate(indices: list[int]) -> Tensor:
                return nearness(images[indices], wanted[indices], scorer)

            return map_batches(rate, len(images), config.batch_size, run.accelerator, f"{name}: nearness").T

        def make() -> dict:
            own = self.wide_images if is_wide else self.decoded(name, vae)
            to_wide = {} if is_wide else {kind: near(own[kind], self.wide_images[kind]) for kind in own}
            if to_wide:  # a repeated prompt counts once
                to_wide["sampled"] = [prompts.by_text(column) for column in to_wide["sampled"]]
            text = scorer.text(prompts.prompts)
            scores_P = clip_scores(own["sampled"], text, scorer, config.batch_size, run.accelerator)
            scores = prompts.by_text(scores_P).tolist()
            clip = mean_and_error(scores)
            for kind, images in own.items():
                pictures = images[: config.pictures]
                run.folder(f"images/{name}/{kind}", lambda folder, pictures=pictures: write_pictures(pictures, folder))
            return {
                "name": name,
                "parameters": count_parameters(vae.decoder),
                "clip": {"mean": clip.mean, "se": clip.se, "per_prompt": scores},
                "nearness": {
                    **{f"{kind}_to_wide": told(to_wide[kind]) if to_wide else None for kind in own},
                    "real_to_image": told(near(own["real"], self.heldout["images"])),
                },
                **({"against_shuffled": check_teacher(self, own["sampled"], prompts)} if is_wide else {}),
            }

        return run.json(f"judged/{name}.json", make)

    def measure(self, narrow: NarrowAutoencoderKL) -> dict:
        """vae_ms.json: both decoders' milliseconds and the ratio, interleaved; rank 0 alone."""
        native = self.teacher.config.sample_size
        sizes = self.decoder.latent_sizes or [native, 2 * native]

        def make() -> dict:
            config = replace(self.latency, batch=1)
            vaes = {"wide": self.wide, "narrow": narrow}
            rows = compare_decoders(vaes, sizes, self.decoder.batches, config, self.device)
            return {"rows": rows, "protocol": asdict(config), "environment": environment()}

        run = self.run
        return run.json("vae_ms.json", lambda: run.agreed(make() if run.accelerator.is_main_process else None))

    def export(self, narrow: NarrowAutoencoderKL) -> None:
        """The teacher pipeline with the narrow decoder, as a diffusers folder."""

        def write(folder: Path) -> None:
            student = with_unet(self.pipeline, self.teacher, vae=narrow)
            log.info(f"exported: {export_pipeline(student, folder, origin=self.origin(self.config.eval)).load}")

        self.run.sealed_folder("export", write)

    def evaluate(self, judged: list[dict]) -> dict:
        """All decoders side by side, CLIP scores paired with the wide one's: evaluation.json."""
        prompts, wide, run = self.prompts[1], judged[0], self.run

        def versus(model: dict) -> dict:
            return asdict(paired_difference(model["clip"]["per_prompt"], wide["clip"]["per_prompt"]))

        def make() -> dict:
            held = self.heldout
            pictures = held["images"][: self.config.eval.pictures]
            run.folder("images/real", lambda folder: write_pictures(pictures, folder))
            return {
                "prompts": prompts.name,
                "prompts_hash": prompts.hash,
                "n": len(prompts.distinct),
                **self.seen_prompts,
                "n_real": len(held["real"]),
                "widths": {"wide": list(self.wide.config.block_out_channels), "narrow": list(self.widths)},
                "protocol": {**self.scorer.protocol, **self.sampler(self.config.eval).protocol},
                "decoders": [{**m, "versus_wide": None if m is wide else versus(m)} for m in judged],
                "environment": environment(),
            }

        return run.json("evaluation.json", make)

    def write_card(self, evaluation: dict, times: dict) -> None:
        """The narrow decoder's scores and times, into the model card."""
        narrow, row = evaluation["decoders"][-1], times["rows"][0]
        faster = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] times as fast as the teacher's"
        where = f"on {times['environment']['device']}, {row['mode']}, {times['protocol']['dtype']}"
        place = f"latents of {row['latent_size']}×{row['latent_size']}, batch {row['batch']}"
        scores = clip_line(narrow["clip"], narrow["versus_wide"])
        self.card("export", [scores, f"VAE decoder: {faster} ({place}, {where})"])

    def report(self) -> None:
        """report.html and its pictures, once; the same to the tracker; the table is printed."""
        run, page, new = self.run, self.run.path / "report.html", not self.run.made("report.html")
        if run.accelerator.is_main_process:
            if new:
                write_vae_report(run.path, self.track)
                shutil.rmtree(self.partial(""), ignore_errors=True)
            print(vae_table(run.path))
            log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
        run.accelerator.wait_for_everyone()

    def track(self) -> None:
        """The table, and the report's pictures, for a tracker if there is one."""
        if self.run.tracker:
            self.run.tracker.table("decoders", HEADER, quality_rows(self.run.load("evaluation.json")))
            for path in sorted((self.run.path / "report").glob("*.png")):
                self.run.tracker.images(f"report/{path.stem}", [Image.open(path).convert("RGB")], [path.stem])


def told(columns: Iterable[Tensor]) -> dict:
    """{measure: {mean, se, per_item}} of one column per measure."""
    values = {name: column.tolist() for name, column in zip(NEARNESS, columns, strict=True)}
    means = {name: mean_and_error(column) for name, column in values.items()}
    return {name: {"mean": m.mean, "se": m.se, "per_item": values[name]} for name, m in means.items()}
