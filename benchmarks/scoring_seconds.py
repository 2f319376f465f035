"""CPU seconds of block scores side by side: the published protocol, the default, and a race.

    python benchmarks/scoring_seconds.py --run runs/prune_unet

Published is surgery for every block and the stock pipeline at 50 steps, on --published-prompts prompts; its seconds are
given for as many prompts as the default takes. The default masks blocks, 64 prompts of 8 guided steps. The race is
`scoring.protocol=racing`, which decides for Algorithm 1 down to --fraction of the latency, by the run's first latency
table. All run with the bundled UNet, the weights of that round and one process's threads, in turn, A B C C B A. To
--out goes seconds.json.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from benchmarks.mask_speed import GUIDANCE, STEPS, by_masks, by_surgery
from slimstep import ROOT
from slimstep.data.prompts import PromptSet
from slimstep.data.shapes import shapes_prompts
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import load_json, write_json
from slimstep.eval.config import ScoringConfig
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.sampling import Sampler
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline
from slimstep.prune.evolve import BlockValue, choose_removals
from slimstep.prune.racing import record_of, run_race
from slimstep.prune.scores import Drawing
from slimstep.prune.screening import screen_blocks

PUBLISHED_STEPS, PROMPTS, BATCH = 50, 64, 64
DEFAULT = ScoringConfig()


def raced(pipeline: DiffusionPipeline, scorer: ClipScorer, prompts: list[str], latency: dict, fraction: float) -> int:
    """Evaluations of the network that a race took."""
    network, sampler = network_of(pipeline), Sampler(pipeline, STEPS, GUIDANCE)
    captions, shared = PromptSet(tuple(prompts), "held-out captions"), (BATCH, Accelerator(cpu=True))
    blocks, full_ms = network.kept_blocks, latency["full_ms"]

    def choose(lost_N: list[float]) -> set[int]:
        values = [BlockValue(b, x, 0.0, latency["sites"][b]["ms"]) for b, x in zip(blocks, lost_N, strict=True)]
        return {blocks.index(action.block) for action in choose_removals(values, full_ms, fraction * full_ms)}

    screen = screen_blocks(network, sampler, captions, *shared)
    drawing = Drawing(network, sampler, as_metric(scorer), captions, *shared, screen.latents_PCHW)
    race = run_race(drawing, blocks, [screen.errors[b] for b in blocks], choose, DEFAULT.tolerance, seed=0)
    return int(record_of(race, DEFAULT.tolerance, sampler.evaluations(network))["evaluations"])


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run of prune_unet with its first round")
    parser.add_argument("--fraction", type=float, default=0.75, help="of the latency, that the race decides for")
    parser.add_argument("--published-prompts", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/search-cost"))
    options = parser.parse_args()
    pipeline, latency = load_pipeline(ROOT / "assets/shapes"), load_json(options.run / "round-00/latency.json")
    network_of(pipeline).load_state_dict(load_file(options.run / "round-00/weights.safetensors"))
    scorer = ClipScorer(f"local-dir:{ROOT}/assets/shapes-clip")
    prompts = list(shapes_prompts("heldout", PROMPTS, 0).prompts)
    some, few, spent = prompts[: DEFAULT.race_prompts], prompts[: options.published_prompts], []
    ways = {
        "published": lambda: by_surgery(pipeline, scorer, few, BATCH, PUBLISHED_STEPS),
        "default": lambda: by_masks(pipeline, scorer, prompts, BATCH, None),
        "racing": lambda: spent.append(raced(pipeline, scorer, some, latency, options.fraction)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in (*ways, *reversed(ways)):
        own = cpu_seconds(ways[name]) * (PROMPTS / len(few) if name == "published" else 1)
        seconds[name].append(round(own, 1))
        print(f"{name}: {own:.0f} CPU seconds", flush=True)
    ratios = {name: [own / base for own, base in zip(seconds[name], seconds["default"], strict=True)] for name in ways}
    setting = {"prompts": PROMPTS, "published_prompts": len(few), "race_prompts": len(some)}
    setting |= {"fraction": options.fraction, "race_evaluations": spent[0], "threads": torch.get_num_threads()}
    rounded = {name: [round(ratio, 4) for ratio in of] for name, of in ratios.items()}
    result = {"environment": environment(), "setting": setting, "cpu_seconds": seconds, "of_the_default": rounded}
    write_json(options.out / "seconds.json", result)


if __name__ == "__main__":
    open_console()
    main()
