"""Samples per second of step distillation, beside a loop in the style of the diffusers examples.

    python benchmarks/distill_speed.py                     # the bundled model
    python benchmarks/distill_speed.py --sd15 --batch 4    # SD-1.5's networks with random weights, on a GPU

Both loops take the same two DDIM steps of the same teacher, the same optimiser and EMA. The other one encodes images
and captions in every step and runs the guidance branches of all rows as two passes. It is timed against ours with every
row guided, where both do the same work in the UNets, and with SnapFusion's tenth of the rows. Interleaved A B B A,
process CPU time on a CPU, wall time on a GPU; the ratio is the median over rounds, with its quartiles.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from slimstep.data.shapes import ShapesPairs
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json
from slimstep.eval.pages.tables import markdown_table
from slimstep.models.conditioning import Conditioning
from slimstep.models.family import denoiser_of
from slimstep.models.known import random_pipeline
from slimstep.models.noise_schedule import add_noise, ddim_step, schedule_of, snr, x0_between, x0_of
from slimstep.models.pipeline import load_pipeline
from slimstep.models.sizes import native_pixels

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = (2.0, 14.0)


class Networks:
    """A frozen teacher, a student that begins as its copy, what encodes, and one batch of data.

    With `widen` above 1 the denoiser has so many times the bundled one's channels, and random weights.
    """

    def __init__(self, sd15: bool, batch: int, device: torch.device, widen: int = 1):
        self.device, self.batch = device, batch
        pipeline = random_pipeline("sd15") if sd15 else load_pipeline(ROOT / "assets/shapes")
        self.vae, self.text_encoder, self.teacher = pipeline.vae, pipeline.text_encoder, pipeline.unet
        if widen > 1:
            channels = [widen * width for width in self.teacher.config.block_out_channels]
            self.teacher = type(self.teacher).from_config(self.teacher.config, block_out_channels=channels)
        pairs = ShapesPairs("train", batch, resolution=native_pixels(pipeline))
        self.images = pairs.images(range(batch)).float() / 127.5 - 1
        token = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.ids = pipeline.tokenizer([pairs.caption(i) for i in range(batch)], **token).input_ids
        self.empty_ids = pipeline.tokenizer([""], **token).input_ids
        for name in ("vae", "text_encoder", "teacher"):
            setattr(self, name, getattr(self, name).to(device).requires_grad_(False).eval())
        self.images, self.ids, self.empty_ids = (x.to(device) for x in (self.images, self.ids, self.empty_ids))
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="v_prediction",
        )  # fmt: skip
        self.schedule = schedule_of(self.scheduler, device)
        self.step_schedule = StepSchedule(self.scheduler, 32, self.scheduler, 16)

    @torch.no_grad()
    def encoded(self) -> dict[str, Tensor]:
        latents = self.vae.encode(self.images).latent_dist.sample() * self.vae.config.scaling_factor
        return {"latents": latents, "text": self.text_encoder(self.ids)[0]}

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        return Conditioning({"text": self.text_encoder(self.empty_ids)[0]})


def our_loop(networks: Networks, guided_share: float) -> Callable[[], None]:
    """One training step of ours: cached latents and texts, guidance branches in one batch."""
    options = {"guided_share": guided_share, "guidance_range": GUIDANCE, "caption_dropout": 0.0}
    args = denoiser_of(networks.teacher), networks.schedule, networks.unconditional(), networks.teacher
    objective = StepDistillation(*args, networks.step_schedule, **options)
    cached, draw = networks.encoded(), torch.Generator(networks.device).manual_seed(0)
    return training_step(networks, lambda student: objective(student, cached, draw)[0])


def example_loop(networks: Networks) -> Callable[[], None]:
    """One training step as the examples write it: everything encoded anew, two passes for guidance, everywhere."""
    schedule, teacher, kind = networks.schedule, networks.teacher, networks.schedule.prediction_type
    bounds_NK = networks.step_schedule.bounds(schedule).to(networks.device)

    def guided(unet: nn.Module, z: Tensor, t: Tensor, text: Tensor, empty: Tensor, w: Tensor) -> Tensor:
        conditional, unconditional = unet(z, t, text).sample, unet(z, t, empty).sample
        return w * conditional - (w - 1) * unconditional

    def loss(student: nn.Module) -> Tensor:
        batch = networks.encoded()
        with torch.no_grad():
            empty = networks.text_encoder(networks.empty_ids.expand(networks.batch, -1))[0]
        x0, text = batch["latents"], batch["text"]
        bounds = bounds_NK[torch.randint(len(bounds_NK), (len(x0),), device=x0.device)]
        w = torch.empty(len(x0), 1, 1, 1, device=x0.device).uniform_(*GUIDANCE)
        start, middle, _ = bounds.T
        at_start, at_middle, at_end = map(schedule.alpha_sigma, bounds.T)
        noise = torch.randn_like(x0)
        z = add_noise(x0, noise, at_start)
        with torch.no_grad():
            half = ddim_step(guided(teacher, z, start, text, empty, w), z, at_start, at_middle, kind)
            landed = ddim_step(guided(teacher, half, middle, text, empty, w), half, at_middle, at_end, kind)
            target = x0_between(z, at_start, landed, at_end)
        pred = x0_of(guided(student, z, start, text, empty, w), z, at_start, kind)
        return (snr(at_start).clamp(min=1) * (pred - target).square().mean((1, 2, 3))).mean()

    return training_step(networks, loss)


def training_step(networks: Networks, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    student = copy.deepcopy(networks.teacher).train().requires_grad_()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
    ema = EMAModel(student.parameters(), decay=0.999, foreach=True)

    def step() -> None:
        with torch.autocast(networks.device.type, torch.bfloat16, enabled=networks.device.type == "cuda"):
            value = loss(student)
        value.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(student.parameters())

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", action="store_true", help="SD-1.5's networks with random weights, 512 pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/distill-speed"), help="where the results go")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    networks = Networks(options.sd15, options.batch, device)
    loops = {
        "diffusers example": example_loop(networks),
        "ours, every row guided": our_loop(networks, 1.0),
        "ours, a tenth guided": our_loop(networks, 0.1),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for k in range(options.rounds + 2):
        for name in list(loops) if k % 2 else reversed(loops):
            taken = seconds(loops[name], device)
            if k >= 2:  # two rounds warm up
                times[name].append(taken)
    example, rows, record = times["diffusers example"], [], {}
    for name, taken in times.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(example, taken, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        middle = statistics.median(ratios)
        record[name] = {"speed_over_example": middle, "quartiles": [low, high], "seconds": taken}
        rows.append([name, f"{middle:.2f}×", f"[{low:.2f}, {high:.2f}]"])
    model = "sd15" if options.sd15 else "shapes"
    facts = {"model": model, "batch": options.batch, "rounds": options.rounds, "environment": environment()}
    write_json(options.out / f"{model}-{device.type}.json", {**facts, "loops": record})
    print(markdown_table(["loop", "samples/s over the example's", "quartiles"], rows))


if __name__ == "__main__":
    open_console()
    main()
