"""What the decoder job works with beside what every job does: the narrow decoder, its latents, its judgement.

Axes: P latents, C channels, H and W height and width.
"""

import copy
import logging
import shutil
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

from data.encoding import encode_images
from data.files import write_tensors
from data.latents import LatentMix
from data.prompts import PromptSet, heldout_prompts, read_prompts
from engine.components import check, component
from engine.config import DecoderConfig, LatentsConfig
from engine.environment import environment
from engine.loop import Objective, load_trained, train, trained
from engine.parallel import map_batches
from engine.run import damaged
from eval.bench import Bench
from eval.compare import mean_and_error, paired_difference
from eval.decoders import NEARNESS, compare_decoders, nearness
from eval.judge import write_pictures
from eval.latents import sampled_latents
from eval.sampling import Sampler
from eval.vae_report import HEADER, quality_rows, vae_table, write_vae_report
from models.cost import count_parameters
from models.decoding import ImageDecoder
from models.pipeline import export_pipeline, with_unet
from models.vae import NarrowAutoencoderKL
from prune.decoder import CHOICES, choose_channels, narrow_widths, narrowed

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

    @property
    def wide(self) -> AutoencoderKL:
        return self.pipeline.vae

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return narrow_widths(self.wide, self.decoder.width)

    def check(self) -> None:
        """ValueError, before anything is made, for a decoder, widths, data or an objective that will not do."""
        if type(self.wide) is not AutoencoderKL:
            kind = type(self.wide).__name__
            raise ValueError(f"the model's VAE is {kind}; a decoder is narrowed from diffusers' own AutoencoderKL")
        _ = self.widths
        if self.decoder.choice not in CHOICES:
            raise ValueError(f"decoder.choice={self.decoder.choice!r} is unknown; choose from {CHOICES}")
        check(self.config.objective, "objective")
        self.objective(self.config.objective)
        self.check_inputs()
        _ = self.training_prompts

    # ---- latents ----

    @cached_property
    def training_prompts(self) -> PromptSet:
        """The captions of training images, or those of a file."""
        asked = self.latents
        if asked.prompt_file:
            return read_prompts(asked.prompt_file).take(asked.prompts)
        return heldout_prompts(self.component("data.pairs"), asked.prompts, name="training captions")

    @property
    def count(self) -> int:
        """Latents of the last round that are sampled; the rest are encoded images."""
        return self.latents.count - round(self.latents.count * self.latents.real_share)

    def sampled(self, count: int) -> Dataset:
        """At least so many latents of the teacher, from the cache or made now."""
        folder, asked = Path(self.config.data.cache.folder), self.latents
        sampler, accelerator = self.sampler(asked), self.run.accelerator
        return sampled_latents(
            sampler, self.teacher, self.training_prompts, count, asked.batch_size, folder, accelerator
        )

    def samples_of(self, r: int) -> LatentMix:
        """What round r learns from: its share of all latents, with the encoded images among them."""
        asked = self.latents
        count = -(-asked.count * (r + 1) // asked.rounds)
        sampled = self.sampled(-(-self.count * (r + 1) // asked.rounds)) if self.count else None
        return LatentMix(sampled, self.pairs if asked.real_share else None, count, asked.real_share)

    @cached_property
    def heldout(self) -> dict[str, Tensor]:
        """What decoders are judged on: `sampled` latents of prompts that nothing was trained on, `real` ones of
        held-out images, and those images, uint8 [P, 3, H, W]."""
        run, config, prompts = self.run, self.config.eval, self.prompts[1]
        if not run.made(HELDOUT):
            sampler, accelerator = self.sampler(config), run.accelerator

            def draw(indices: list[int]) -> Tensor:
                texts = sampler.encode(prompts.prompts).rows(indices)
                noise, draws = torch.stack([sampler.noise(i) for i in indices]), sampler.generators(indices)
                return sampler.latents(self.teacher, texts, noise, generators=draws).float()

            size = len(prompts.prompts)
            sampled = map_batches(draw, size, config.batch_size, accelerator, "held-out latents", self.partial("held"))
            if accelerator.is_main_process:
                images = self.heldout_images(size)
                encoded = [
                    encode_images(self.pipeline, batch, self.device)["latents"].float().cpu()
                    for batch in images.split(config.batch_size)
                ]
                tensors = {"sampled": sampled, "real": torch.cat(encoded), "images": images}
                write_tensors(run.path / HELDOUT, tensors)
            accelerator.wait_for_everyone()
        with damaged(run.path / HELDOUT):
            return load_file(run.path / HELDOUT)

    def heldout_images(self, count: int) -> Tensor:
        """uint8 images [P, 3, H, W] of the held-out split, as many as there are up to `count`."""
        pairs = component(OmegaConf.merge(self.config, {"data": {"pairs": {"split": "heldout"}}}), "data.pairs")
        return torch.stack([pairs[i]["image"] for i in range(min(count, len(pairs)))])

    # ---- the narrow decoder ----

    def sliced(self) -> NarrowAutoencoderKL:
        """The chosen channels of the wide decoder, untrained; the choice is in channels.json."""

        def choose() -> dict:
            samples = self.heldout_free_latents() if self.decoder.choice in ("taylor", "energy") else None
            return choose_channels(self.wide, self.widths, self.decoder.choice, samples, self.run.seed)

        channels = self.run.json("channels.json", choose)
        log.info(
            f"decoder: widths {tuple(self.wide.config.block_out_channels)} → {self.widths}, by {self.decoder.choice}"
        )
        return narrowed(self.wide, channels, self.widths)

    def heldout_free_latents(self) -> Tensor:
        """Latents to choose channels by: the first that training sees."""
        mix = self.samples_of(0)
        return torch.stack([mix[i]["latents"] for i in range(min(self.decoder.samples, len(mix)))])

    def distil(self, narrow: NarrowAutoencoderKL) -> NarrowAutoencoderKL:
        """Trained round by round, each with more latents; a finished round is loaded."""
        config = OmegaConf.to_object(self.config.train)
        narrow = copy.deepcopy(narrow)
        for r in range(self.latents.rounds):
            stage = f"round-{r:02d}"
            student = ImageDecoder(narrow.requires_grad_(False))
            student.decoder.requires_grad_(True)
            if trained(self.run, stage):
                load_trained(student, self.run, stage)
            else:
                train(student, self.objective(self.config.objective), self.samples_of(r), config, self.run, stage)
        return narrow.requires_grad_(False).eval()

    def objective(self, config, **given) -> Objective:
        """The loss, with the wide decoder as training runs it. ValueError where its arguments will not do."""
        wide = ImageDecoder(copy.deepcopy(self.wide)).to(self.device, self.compute_dtype)
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
        return Sampler(pipeline, config.steps, config.guidance_scale, config.seed)

    def judge(self, name: str, vae: AutoencoderKL) -> dict:
        """Its images beside the wide decoder's and beside real ones, and their CLIP scores: judged/<name>.json."""
        run, config, prompts, scorer = self.run, self.config.eval, self.prompts[1], self.scorer

        def decoded(vae, latents: Tensor) -> Tensor:
            decode = self.sampler_with(vae).decode
            what = f"{name}: decoding"
            return map_batches(
                lambda indices: decode(latents[indices]), len(latents), config.batch_size, run.accelerator, what
            )

        def make() -> dict:
            text_PD, sets = (
                scorer.text(prompts.prompts),
                {"sampled": self.heldout["sampled"], "real": self.heldout["real"]},
            )
            own = {kind: decoded(vae, latents) for kind, latents in sets.items()}
            wide = own if vae is self.wide else {kind: decoded(self.wide, latents) for kind, latents in sets.items()}
            near = {}
            for kind in sets:
                values = nearness(own[kind], wide[kind], scorer) if vae is not self.wide else None
                near[f"{kind}_to_wide"] = None if values is None else told(values)
            near["real_to_image"] = told(nearness(own["real"], self.heldout["images"], scorer))
            scores = prompts.by_text(scorer.score(own["sampled"], text_PD)).tolist()
            clip = mean_and_error(scores)
            for kind in sets:
                run.folder(f"images/{name}/{kind}", lambda f, k=kind: write_pictures(own[k][: config.pictures], f))
            return {
                "name": name,
                "parameters": count_parameters(vae.decoder),
                "clip": {"mean": clip.mean, "se": clip.se, "per_prompt": scores},
                "nearness": near,
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

        return self.run.json("vae_ms.json", lambda: make() if self.run.accelerator.is_main_process else None)

    def export(self, narrow: NarrowAutoencoderKL) -> None:
        """The teacher pipeline with the narrow decoder, as a diffusers folder."""

        def write(folder: Path) -> None:
            log.info(f"exported: {export_pipeline(with_unet(self.pipeline, self.teacher, vae=narrow), folder).load}")

        self.run.sealed_folder("export", write)

    def evaluate(self, judged: list[dict]) -> dict:
        """All decoders side by side, CLIP scores paired with the wide one's: evaluation.json."""
        prompts, wide, run = self.prompts[1], judged[0], self.run

        def versus(model: dict) -> dict:
            return asdict(paired_difference(model["clip"]["per_prompt"], wide["clip"]["per_prompt"]))

        def make() -> dict:
            held = self.heldout
            real = run.folder("images/real", lambda f: write_pictures(held["images"][: self.config.eval.pictures], f))
            log.debug(f"real images: {real}")
            return {
                "prompts": prompts.name,
                "prompts_hash": prompts.hash,
                "n": len(prompts.distinct),
                "n_real": len(held["real"]),
                "widths": {"wide": list(self.wide.config.block_out_channels), "narrow": list(self.widths)},
                "protocol": {**self.scorer.protocol, **self.sampler(self.config.eval).protocol},
                "decoders": [{**m, "versus_wide": None if m is wide else versus(m)} for m in judged],
                "environment": environment(),
            }

        return run.json("evaluation.json", make)

    def report(self) -> None:
        """report.html and its pictures, once; the same to the tracker; the table is printed."""
        run, page, new = self.run, self.run.path / "report.html", not self.run.made("report.html")
        if run.accelerator.is_main_process:
            if new:
                write_vae_report(run.path)
                self.track()
                shutil.rmtree(self.partial(""), ignore_errors=True)
            print(vae_table(run.path))
            log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
        run.accelerator.wait_for_everyone()

    def track(self) -> None:
        if self.run.tracker:
            self.run.tracker.table("decoders", HEADER, quality_rows(self.run.load("evaluation.json")))
            for path in sorted((self.run.path / "report").glob("*.png")):
                self.run.tracker.images(f"report/{path.stem}", [Image.open(path).convert("RGB")], [path.stem])


def told(values_P3: Tensor) -> dict:
    """{measure: {mean, se, per_item}}."""
    columns = {name: column.tolist() for name, column in zip(NEARNESS, values_P3.T, strict=True)}
    means = {name: mean_and_error(column) for name, column in columns.items()}
    return {name: {"mean": m.mean, "se": m.se, "per_item": columns[name]} for name, m in means.items()}
