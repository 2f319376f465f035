"""What do block scores cost, and how good is what is decided by them?

    python benchmarks/search_cost.py --run runs/prune_unet --keep runs/search-cost
    python benchmarks/search_cost.py --run runs/prune_transformer --model assets/shapes-dit --max-sequence-length 1

Every removal of a bundled model, with the weights and the latency table of a run's first round, is drawn for many
held-out prompts (hours on two cores; killed, it continues): the reference. Every protocol is then tried on prompts that
are drawn at random from these, many times, at every budget. Its regret is what the removals that it chooses lose by the
reference, in sum, more than the reference's own choice, as if losses added up. Beside it stand the blocks that the
reference is sure of: taken in 95 % of its bootstrap resamples, or left in 95 %, and how many of these a protocol has on
that side. An evaluation is one row of the network; guidance counts twice. To --out go table.md and results.json.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep import ROOT
from slimstep.data.prompts import PromptSet
from slimstep.data.shapes import shapes_prompts
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import load_json, write_json, write_text
from slimstep.engine.progress import progress
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.pages.tables import Table
from slimstep.eval.sampling import Sampler
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline
from slimstep.prune.evolve import BlockValue, choose_removals
from slimstep.prune.racing import record_of, run_race
from slimstep.prune.scores import Drawing, picture_error
from slimstep.prune.screening import screen_blocks

STEPS, GUIDANCE, BATCH = 8, 2.5, 64
ROWS = STEPS * 2  # evaluations of an image
FRACTIONS = (0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
CHUNK = 16  # prompts of one screen
SURE = 0.95


@dataclass(frozen=True)
class Reference:
    """lost_NP and psnr_NP of all removals and prompts; errors_KN: of K screens of CHUNK prompts each."""

    blocks: tuple[str, ...]
    ms_N: np.ndarray
    teacher_ms: float
    base_P: Tensor
    lost_NP: Tensor
    psnr_NP: Tensor
    errors_KN: np.ndarray
    others_psnr: float

    def values(self, lost_N: Sequence[float]) -> list[BlockValue]:
        return [BlockValue(b, x, 0.0, ms) for b, x, ms in zip(self.blocks, lost_N, self.ms_N.tolist(), strict=True)]


@dataclass(frozen=True)
class Outcome:
    """A protocol at a budget, over many draws of its prompts: means, and the regret's 95 % point."""

    protocol: str
    fraction: float
    evaluations: float
    regret: float
    regret_se: float
    regret_p95: float
    sure_kept: float


# ---- the reference ----


def measure(options: argparse.Namespace) -> Reference:
    run, file = options.run / "round-00", options.keep / "values.safetensors"
    latency = load_json(run / "latency.json")
    pipeline = load_pipeline(options.model, max_sequence_length=options.max_sequence_length)
    unet = network_of(pipeline)
    unet.load_state_dict(load_file(run / "weights.safetensors"))
    prompts = PromptSet(shapes_prompts("heldout", options.prompts, 0).prompts, "held-out captions")
    blocks, accelerator = unet.kept_blocks, Accelerator(cpu=options.cpu)
    unet = unet.to(accelerator.device).eval().requires_grad_(False)
    if not file.exists():
        sampler = Sampler(pipeline, STEPS, GUIDANCE)
        metric = as_metric(ClipScorer(f"local-dir:{ROOT}/assets/shapes-clip"))
        drawing = Drawing(unet, sampler, metric, prompts, BATCH, accelerator)
        base_P = drawing.base(range(len(prompts)), options.keep / "base")
        pairs = [(block, number) for block in blocks for number in range(len(prompts))]
        values_NP2 = drawing.changes(pairs, options.keep / "changes").view(len(blocks), len(prompts), 2)
        errors = []
        for first in range(0, len(prompts), CHUNK):
            own = PromptSet(prompts.prompts[first : first + CHUNK], "some")
            keep = options.keep / f"screen-{first}"
            errors.append(list(screen_blocks(unet, sampler, own, BATCH, accelerator, keep).errors.values()))
        found = {"base": base_P, "values": values_NP2, "errors": torch.tensor(errors)}
        save_file({**found, "others": torch.tensor(drawing.others_psnr)}, file)
    found = load_file(file)
    lost_NP, psnr_NP = (part.contiguous() for part in found["values"].unbind(-1))
    ms_N = np.array([latency["sites"][block]["ms"] for block in blocks])
    own = found["base"], lost_NP, psnr_NP, found["errors"].double().numpy(), found["others"].item()
    return Reference(tuple(blocks), ms_N, latency["full_ms"], *own)


# ---- the protocols, on prompts drawn from the reference's ----

Choose = Callable[[Sequence[float]], set[int]]


class Replayed(Drawing):
    """A drawing whose images were drawn before: those of prompts in a random order."""

    def __init__(self, reference: Reference, order: np.ndarray) -> None:
        self.reference, self.order = reference, order.tolist()
        self.texts = ("",) * len(order)  # of which no more than the number is used
        self.places = {block: n for n, block in enumerate(reference.blocks)}

    def base(self, prompts: Sequence[int], keep: Path | None = None) -> Tensor:
        return self.reference.base_P[[self.order[number] for number in prompts]]

    def changes(self, pairs: Sequence[tuple[str, int]], keep: Path | None = None) -> Tensor:
        places = [self.places[block] for block, _ in pairs], [self.order[number] for _, number in pairs]
        return torch.stack([self.reference.lost_NP[places], self.reference.psnr_NP[places]], dim=1)

    @property
    def others_psnr(self) -> float:
        return self.reference.others_psnr


def by_clip(count: int) -> Callable:
    """CLIP score lost on so many prompts."""

    def decide(reference: Reference, order: np.ndarray, choose: Choose) -> tuple[set[int], float]:
        lost_N = reference.lost_NP[:, order[:count].tolist()].mean(1)
        return choose(lost_N.tolist()), (1 + len(lost_N)) * count * ROWS

    return decide


def by_pictures(count: int) -> Callable:
    """The squared error of the pictures, on so many prompts."""

    def decide(reference: Reference, order: np.ndarray, choose: Choose) -> tuple[set[int], float]:
        psnr_N = reference.psnr_NP[:, order[:count].tolist()].mean(1)
        errors = [picture_error(own, reference.others_psnr) for own in psnr_N.tolist()]
        return choose(errors), (1 + len(errors)) * count * ROWS

    return decide


def screened(reference: Reference, order: np.ndarray, chunks: int) -> np.ndarray:
    """Errors of the changes by so many screens, in a random order of their own."""
    return reference.errors_KN[order[order < len(reference.errors_KN)][:chunks]].mean(0)


def by_screen(chunks: int) -> Callable:
    """The error of one evaluation each, on so many times CHUNK prompts."""

    def decide(reference: Reference, order: np.ndarray, choose: Choose) -> tuple[set[int], float]:
        errors_N = screened(reference, order, chunks)
        return choose(errors_N.tolist()), chunks * CHUNK * (ROWS + 1 + len(errors_N))

    return decide


def by_race(chunks: int, tolerance: float) -> Callable:
    """A screen of so many times CHUNK prompts, and prompts for the changes that it leaves open."""

    def decide(reference: Reference, order: np.ndarray, choose: Choose) -> tuple[set[int], float]:
        errors, drawing = screened(reference, order, chunks).tolist(), Replayed(reference, order[: chunks * CHUNK])
        race = run_race(drawing, reference.blocks, errors, choose, tolerance, seed=0)
        return choose(race.estimate.mean_N.tolist()), record_of(race, tolerance, ROWS)["evaluations"]

    return decide


PROTOCOLS: Mapping[str, Callable] = {
    "CLIP, 64 prompts (snapfusion, the default)": by_clip(64),
    "CLIP, 16 prompts": by_clip(16),
    "CLIP, 3 prompts": by_clip(3),
    "pictures, 3 prompts (search.metric=psnr)": by_pictures(3),
    "one evaluation each, 64 prompts": by_screen(4),
    "one evaluation each, 16 prompts": by_screen(1),
    "race, tolerance 0.1 (racing)": by_race(1, 0.1),
    "race, tolerance 1": by_race(1, 1.0),
}


def simulate(reference: Reference, draws: int) -> list[Outcome]:
    lost_N, found = reference.lost_NP.double().mean(1).numpy(), []
    price_N, every = np.maximum(lost_N, 0), reference.lost_NP.shape[1]
    for fraction in progress(FRACTIONS, desc="budgets"):
        choose = chooser(reference, fraction)
        best, sides = choose(lost_N.tolist()), sure_sides(reference, choose)
        for name, decide in PROTOCOLS.items():
            regrets, spent, right = [], [], []
            for draw in range(draws):
                order = np.random.default_rng(draw).permutation(every)
                chosen, evaluations = decide(reference, order, choose)
                regrets.append(price_N[sorted(chosen)].sum() - price_N[sorted(best)].sum())
                spent.append(evaluations)
                right.append(np.mean([(n in chosen) == side for n, side in sides.items()]))
            se, p95 = np.std(regrets, ddof=1) / draws**0.5, np.quantile(regrets, 0.95)
            numbers = np.mean(spent), np.mean(regrets), se, p95, np.mean(right)
            found.append(Outcome(name, fraction, *(float(x) for x in numbers)))
    return found


def chooser(reference: Reference, fraction: float) -> Choose:
    """Algorithm 1's order, down to a share of the teacher's latency."""
    places = {block: n for n, block in enumerate(reference.blocks)}

    def choose(lost_N: Sequence[float]) -> set[int]:
        actions = choose_removals(reference.values(lost_N), reference.teacher_ms, fraction * reference.teacher_ms)
        return {places[action.block] for action in actions}

    return choose


def sure_sides(reference: Reference, choose: Choose, resamples: int = 200) -> dict[int, bool]:
    """{block: whether it is taken} of those that the reference's resamples agree on."""
    draw, lost_NP = np.random.default_rng(0), reference.lost_NP.double().numpy()
    taken_N = np.zeros(len(lost_NP))
    for _ in range(resamples):
        prompts = draw.integers(lost_NP.shape[1], size=lost_NP.shape[1])
        taken_N[sorted(choose(lost_NP[:, prompts].mean(1).tolist()))] += 1 / resamples
    return {n: share > 0.5 for n, share in enumerate(taken_N.tolist()) if not 1 - SURE < share < SURE}


# ---- the table ----


def by_protocol(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    return [(name, [outcome for outcome in outcomes if outcome.protocol == name]) for name in PROTOCOLS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run of prune_unet with its first round")
    parser.add_argument("--model", type=Path, default=ROOT / "assets/shapes", help="that the run pruned")
    parser.add_argument("--max-sequence-length", type=int, help="of a transformer's pipeline (default: its own)")
    parser.add_argument("--keep", type=Path, default=Path("runs/search-cost"), help="where the reference goes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/search-cost"), help="where the results go")
    parser.add_argument("--prompts", type=int, default=512, help="of the reference")
    parser.add_argument("--draws", type=int, default=60, help="of prompts for every protocol")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    reference = measure(options)
    outcomes = simulate(reference, options.draws)
    default = np.mean([o.evaluations for o in outcomes if o.protocol == next(iter(PROTOCOLS))])
    table = Table.of({
        "scores": lambda row: row[0],
        "evaluations": lambda row: f"{np.mean([o.evaluations for o in row[1]]):,.0f}",
        "of the default": lambda row: f"1/{default / np.mean([o.evaluations for o in row[1]]):.1f}",
        "regret, CLIP": lambda row: f"{np.mean([o.regret for o in row[1]]):.2f}",
        "its worst budget": lambda row: f"{max(o.regret for o in row[1]):.2f}",
        "95 % of draws below": lambda row: f"{np.mean([o.regret_p95 for o in row[1]]):.2f}",
        "sure blocks on their side": lambda row: f"{np.mean([o.sure_kept for o in row[1]]):.1%}",
    }, by_protocol(outcomes))  # fmt: skip
    write_text(options.out / "table.md", table.markdown)
    losses = {b: round(x, 4) for b, x in zip(reference.blocks, reference.lost_NP.mean(1).tolist(), strict=True)}
    facts = {"model": options.model.name}
    facts |= {"prompts": reference.lost_NP.shape[1], "steps": STEPS, "guidance_scale": GUIDANCE, "draws": options.draws}
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(o).items()} for o in outcomes]
    record = {**facts, "environment": environment(), "lost": losses, "outcomes": rounded}
    write_json(options.out / "results.json", record)
    print(table.console)


if __name__ == "__main__":
    open_console()
    main()
