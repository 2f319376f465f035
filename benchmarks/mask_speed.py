"""Scoring blocks by masks, beside surgery and the stock pipeline, which is how it is done by hand.

    python benchmarks/mask_speed.py --model assets/shapes
    python benchmarks/mask_speed.py --model assets/shapes-dit --max-sequence-length 1

All take the CLIP score that is lost without each block, on the same held-out captions from the same noise, with equal
steps, guidance and batch size, in turn, A B C C B A, in one process with all threads. By hand a stock pipeline is made
around the network without the block and called. `screened` scores the blocks alone that one evaluation of each finds
cheapest, until they save twice what a round of two has to save for 70 % of the latency (scoring.protocol=screened). A
speed is the ratio within a round, of wall and of CPU seconds; the scores are compared.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

from slimstep import ROOT
from slimstep.data.prompts import PromptSet
from slimstep.data.shapes import shapes_prompts
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json
from slimstep.eval.config import LatencyConfig
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.sampling import Sampler
from slimstep.models.family import family_of
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline, with_unet
from slimstep.prune.latency import latency_table
from slimstep.prune.scores import score_blocks
from slimstep.prune.screening import screen_blocks

STEPS, GUIDANCE = 8, 2.5
TARGET, ROUNDS, MARGIN = 0.7, 2, 2.0  # of the search that the screen is for
Losses = dict[str, float]


def by_masks(
    pipeline: DiffusionPipeline, scorer: ClipScorer, prompts: Sequence[str], batch: int, ms: dict[str, float] | None
) -> Losses:
    """{block: CLIP score lost without it}, by the code of the pruning job, behind the screen where `ms` is given."""
    captions = PromptSet(list(prompts), "held-out captions")
    sampler, accelerator = Sampler(pipeline, STEPS, GUIDANCE), Accelerator(cpu=True)
    network, begun = network_of(pipeline), {}
    if ms:
        screen = screen_blocks(network, sampler, captions, batch, accelerator)
        cheapest = screen.cheapest(ms, MARGIN * sum(ms.values()) * (1 - TARGET) / ROUNDS)
        begun = {"blocks": cheapest, "latents_PCHW": screen.latents_PCHW}
    table = score_blocks(network, sampler, as_metric(scorer), captions, batch, accelerator, **begun)
    return {block: score["delta_clip"] for block, score in table.record({})["sites"].items()}


def by_surgery(
    pipeline: DiffusionPipeline, scorer: ClipScorer, prompts: Sequence[str], batch: int, steps: int = STEPS
) -> Losses:
    """The same, by the stock pipeline's own call."""
    network, text_ND, family = network_of(pipeline), scorer.text(prompts), family_of(pipeline)
    sampler = Sampler(pipeline, steps, GUIDANCE)

    def scores(architecture: dict[str, int]) -> Tensor:
        pruned = with_unet(pipeline, network.with_architecture(architecture))
        stock = family.exported(pruned).pipeline
        stock.set_progress_bar_config(disable=True)
        found = []
        for indices in torch.arange(len(prompts)).split(batch):
            noise = torch.stack([sampler.noise(index) for index in indices.tolist()])
            called = family.call(stock, GUIDANCE, noise)
            texts = [prompts[index] for index in indices]
            images = stock(texts, num_inference_steps=steps, output_type="pt", **called).images
            found.append(scorer.score((images * 255).round().to(torch.uint8), text_ND[indices]))
        return torch.cat(found)

    whole_N = scores({})
    return {block: float((whole_N - scores({block: 0})).mean()) for block in network.all_blocks}


def timed(work: Callable[[], Losses]) -> dict:
    start, cpu = time.perf_counter(), time.process_time()
    lost = work()
    return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets/shapes")
    parser.add_argument("--scorer", type=Path, default=ROOT / "assets/shapes-clip")
    parser.add_argument("--max-sequence-length", type=int, help="of a transformer's pipeline (default: its own)")
    parser.add_argument("--rounds", type=int, default=2, help="of A B C C B A (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="default: benchmarks/mask-speed/MODEL.json")
    options = parser.parse_args()
    pipeline = load_pipeline(options.model, max_sequence_length=options.max_sequence_length)
    scorer = ClipScorer(f"local-dir:{options.scorer}")
    prompts = list(shapes_prompts("heldout", options.prompts, 0).prompts)
    given = pipeline, scorer, prompts, options.batch
    latency = latency_table(network_of(pipeline), LatencyConfig(), torch.device("cpu"))
    ms = {block: entry["ms"] for block, entry in latency["sites"].items()}
    ways = {"surgery": lambda: by_surgery(*given), "masks": lambda: by_masks(*given, None),
            "screened": lambda: by_masks(*given, ms)}  # fmt: skip
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name in (*ways, *reversed(ways)):
            runs[name].append(timed(ways[name]))
            print(f"{name}: {runs[name][-1]['wall']:.1f} s, CPU {runs[name][-1]['cpu']:.1f} s", flush=True)
    ratios = {
        (name, clock): [by_hand[clock] / ours[clock] for by_hand, ours in zip(runs["surgery"], runs[name], strict=True)]
        for name in ("masks", "screened")
        for clock in ("wall", "cpu")
    }
    by_hand, ours, screened = (runs[name][0]["lost"] for name in ways)
    result = {
        "model": options.model.name,
        "environment": environment(),
        "setting": {"prompts": options.prompts, "steps": STEPS, "guidance": GUIDANCE, "batch": options.batch,
                    "max_sequence_length": options.max_sequence_length, "threads": torch.get_num_threads(),
                    "blocks": len(ours)},
        "times_as_fast": {
            f"{name}, {clock}": {"median": statistics.median(r), "range": [min(r), max(r)]}
            for (name, clock), r in ratios.items()
        },
        "screened": {"target": TARGET, "rounds": ROUNDS, "margin": MARGIN, "scored": list(screened)},
        "largest_difference_of_scores": max(abs(by_hand[block] - ours[block]) for block in ours),
        "runs": {name: [{k: v for k, v in run.items() if k != "lost"} for run in made] for name, made in runs.items()},
        "lost": ours,
    }  # fmt: skip
    write_json(options.out or ROOT / f"benchmarks/mask-speed/{options.model.name}.json", result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("runs", "environment", "lost")}, indent=1))


if __name__ == "__main__":
    main()
