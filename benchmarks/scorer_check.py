"""What a scorer makes of data sets: their images with their own captions and shuffled ones, and the seconds it takes.

    python benchmarks/scorer_check.py digits=DIR emoji=DIR photographs=DIR   # image folders; `shapes` is always there

Writes benchmarks/scorer-check/results.json: of every set what a job's scorer_check.json says, by the bundled scorer.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {"_target_": "slimstep.data.shapes.ShapesPairs", "size": 4096, "resolution": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", help="NAME=DIR, image folders as data=imagefolder takes them")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/scorer-check/results.json")
    options = parser.parse_args()
    from accelerate import Accelerator
    from omegaconf import OmegaConf

    from slimstep.engine.environment import environment
    from slimstep.engine.files import write_json
    from slimstep.engine.run import Run
    from slimstep.eval.metrics.clip import ClipScorer
    from slimstep.eval.pages.cautions import is_above_chance
    from slimstep.eval.scorer_check import measured

    folders = dict(word.split("=", 1) for word in options.sets)
    images = {"_target_": "slimstep.data.images.ImageFolderPairs", "resolution": 64}
    sets = {"shapes": SHAPES, **{name: {**images, "root": root} for name, root in folders.items()}}
    scorer, results = ClipScorer(f"local-dir:{ROOT}/assets/shapes-clip"), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in sets.items():
            config = OmegaConf.create({"data": {"pairs": pairs}})
            start, cpu = time.perf_counter(), time.process_time()
            record = measured(config, Run(folder, Accelerator(cpu=True)), scorer)
            seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            results[name] = {**seconds, **record, "passes": is_above_chance(record)}
            print(name, json.dumps(results[name]))
    write_json(options.out, {"sets": results, "scorer": scorer.protocol, "environment": environment()})


if __name__ == "__main__":
    main()
