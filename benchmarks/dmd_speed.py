"""Samples per second and peak memory of distribution matching, beside a loop in the style of the published scripts.

    python benchmarks/dmd_speed.py                       # the bundled UNet, one step and four
    python benchmarks/dmd_speed.py --sd15 --batch 4      # SD-1.5's networks with random weights, on a GPU
    python benchmarks/dmd_speed.py --widen 4 --batch 4   # four times the bundled UNet's channels, random weights

Both train the same student and fake score, five updates of the latter to one of the former, with the same optimisers
and EMA. The published style encodes images and captions in every iteration, draws new samples for every update of the
fake score, and runs the teacher's two branches and the fake score as three passes. Interleaved A B C … C B A, process
CPU time on a CPU, wall time on a GPU; a speed is the ratio within a round. Peak memory is that of a process of its own
that takes two steps, less what it held before it made the networks (resident on a CPU, allocated on a GPU).
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.distill_speed import Networks, seconds
from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json
from slimstep.engine.objective import STUDENT
from slimstep.engine.seeding import generator
from slimstep.eval.pages.tables import markdown_table
from slimstep.models.family import denoiser_of
from slimstep.models.noise_schedule import add_noise, ddim_step, target_of, x0_of

GUIDANCE, FAKE_UPDATES, RANGE = 2.5, 5, (0.02, 0.98)
PUBLISHED = "published style"
OURS = {"ours": {}, "ours, low-rank fake score": {"fake_lora_rank": 16}}
COMPILED = "ours, compiled"


class Trained:
    """A network with its optimiser, as all loops have it."""

    def __init__(self, network: nn.Module, device: torch.device):
        self.network, self.device = network.train(), device
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-5, fused=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def minimise(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def our_loop(networks: Networks, steps: int, is_compiled: bool, **options: int) -> Callable[[], None]:
    """A step of the training loop: cached latents and texts, samples shared by the fake score's updates."""
    way = StepSchedule(networks.scheduler, 32, networks.scheduler, steps)
    args = denoiser_of(networks.teacher), networks.schedule, networks.unconditional(), networks.teacher, way
    objective = DistributionMatching(*args, lambda: networks.teacher, GUIDANCE, FAKE_UPDATES, **options)
    student = copy.deepcopy(networks.teacher).requires_grad_()
    trained = {name: Trained(n, networks.device) for name, n in {STUDENT: student, **objective.networks}.items()}
    called = {name: one.network for name, one in trained.items()}
    if is_compiled:
        for network in (networks.teacher, *called.values()):
            network.compile(dynamic=False)
    ema = EMAModel(student.parameters(), decay=0.999, foreach=True)
    cached, steps_done = networks.encoded(), count()

    def step() -> None:
        done = next(steps_done)
        for nth, update in enumerate(objective.updates(0)):
            for name, one in trained.items():
                for parameter in one.parameters:
                    parameter.requires_grad_(name == update)
            with trained[update].autocast():
                draw = generator(done, nth, device=networks.device)
                loss, _ = objective.loss(called, {**cached, "nth": nth}, draw, update)
            trained[update].minimise(loss)
        ema.step(student.parameters())

    return step


def published_loop(networks: Networks, steps: int) -> Callable[[], None]:
    """As many iterations as the fake score has updates: each draws its samples, the last trains the student, too."""
    schedule, kind = networks.schedule, networks.schedule.prediction_type
    starts_ends = schedule.grid(networks.scheduler, steps).to(networks.device)
    teacher, device = networks.teacher, networks.device
    student, fake = (Trained(copy.deepcopy(teacher).requires_grad_(), device) for _ in range(2))
    ema = EMAModel(student.network.parameters(), decay=0.999, foreach=True)

    def generate(text: Tensor, with_gradient: bool) -> Tensor:
        z = torch.randn(networks.batch, *teacher_shape(networks), device=device)
        stop = int(torch.randint(steps, ()))
        for k in range(stop + 1):
            start, end = (t.expand(len(z)) for t in starts_ends[k])
            with torch.set_grad_enabled(with_gradient and k == stop):
                pred = student.network(z, start, text).sample
            if k < stop:
                z = ddim_step(pred, z, schedule.alpha_sigma(start), schedule.alpha_sigma(end), kind)
        return x0_of(pred, z, schedule.alpha_sigma(start), kind)

    def noisy(x0: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        t = schedule.time_at(torch.empty(len(x0), device=device).uniform_(*RANGE))
        noise, level = torch.randn_like(x0), schedule.alpha_sigma(t)
        return add_noise(x0, noise, level), t, noise, level

    def iteration(trains_student: bool) -> None:
        batch = networks.encoded()
        with torch.no_grad():
            empty = networks.text_encoder(networks.empty_ids.expand(networks.batch, -1))[0]
        text = batch["text"]
        with student.autocast():
            x0 = generate(text, trains_student)
        if trains_student:
            z, t, _, level = noisy(x0.detach())
            with torch.no_grad(), student.autocast():
                conditional = teacher(z, t, text).sample
                unconditional = teacher(z, t, empty).sample
                real = x0_of(unconditional + GUIDANCE * (conditional - unconditional), z, level, kind)
                moved = x0_of(fake.network(z, t, text).sample, z, level, kind) - real
                target = x0 - moved / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
            student.minimise(0.5 * nn.functional.mse_loss(x0, target))
            ema.step(student.network.parameters())
        z, t, noise, level = noisy(x0.detach())
        with fake.autocast():
            pred = fake.network(z, t, text).sample
        fake.minimise(nn.functional.mse_loss(pred, target_of(x0.detach(), noise, level, kind)))

    def step() -> None:
        for k in range(FAKE_UPDATES):
            iteration(k == FAKE_UPDATES - 1)

    return step


def teacher_shape(networks: Networks) -> tuple[int, ...]:
    return denoiser_of(networks.teacher).sample_shape


def loop(name: str, networks: Networks, steps: int) -> Callable[[], None]:
    if name == PUBLISHED:
        return published_loop(networks, steps)
    return our_loop(networks, steps, name == COMPILED, **OURS.get(name, {}))


def peak_memory(name: str, steps: int, options: argparse.Namespace) -> int:
    """Bytes, in a process of its own."""
    child = [sys.executable, __file__, "--child", name, "--steps", str(steps), "--batch", str(options.batch)]
    child += [f"--widen={options.widen}", *["--sd15"] * options.sd15]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since `forget_peak`; getrusage's includes the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", action="store_true", help="SD-1.5's networks with random weights, 512 pixels")
    parser.add_argument("--widen", type=int, default=1, help="so many times the bundled UNet's channels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="of the student")
    parser.add_argument("--compile", action="store_true", help="also train.compile=true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/dmd-speed"), help="where the results go")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    networks = partial(Networks, options.sd15, options.batch, device, options.widen)
    if options.child:
        before = resident("VmRSS")
        step = loop(options.child, networks(), *options.steps)
        forget_peak()
        step(), step()
        on_gpu = device.type == "cuda"
        print(json.dumps(torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before))
        return
    names, rows, record = [PUBLISHED, *OURS, *([COMPILED] if options.compile else [])], [], {}
    for steps in options.steps:
        loops = {name: loop(name, networks(), steps) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for k in range(options.rounds + 1):
            for name in names if k % 2 else reversed(names):
                taken = seconds(loops[name], device)
                if k:  # one round warms up
                    times[name].append(taken)
        peaks = {name: peak_memory(name, steps, options) for name in names if name != COMPILED}
        for name in names:
            ratios = sorted(theirs / ours for theirs, ours in zip(times[PUBLISHED], times[name], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            memory = peaks[name] / peaks[PUBLISHED] if name in peaks else None
            record[f"{name}, {steps} steps"] = {
                "speed": middle, "quartiles": [low, high], "seconds": times[name], "peak_bytes": peaks.get(name),
                "memory": memory,
            }  # fmt: skip
            shown = "–" if memory is None else f"{memory:.2f}×"
            rows.append([name, str(steps), f"{middle:.2f}×", f"[{low:.2f}, {high:.2f}]", shown])
    model = "sd15" if options.sd15 else "shapes" if options.widen == 1 else f"shapes-{options.widen}-times-as-wide"
    weights = sum(parameter.numel() for parameter in networks().teacher.parameters())
    facts = {"model": model, "weights": weights, "batch": options.batch, "rounds": options.rounds}
    facts |= {"environment": environment(), "loops": record}
    write_json(options.out / f"{model}-{device.type}.json", facts)
    print(markdown_table(["loop", "steps", "samples/s over the published style's", "quartiles", "peak memory"], rows))


if __name__ == "__main__":
    open_console()
    main()
