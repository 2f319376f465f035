"""A pipeline of a known size with random weights, and its pruned and narrow kin: for speed, where weights are not.

    python scripts/random_pipeline.py sd15 runs/random/sd15      # also sd21, sdxl

Writes DIR/teacher; DIR/pruned, without the blocks that BK-SDM's base and small networks lack; DIR/narrow, whose VAE
decoder has half its channels. Half precision, what is there stays.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.engine.launch import fail
from slimstep.engine.quiet import one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", help="sd15, sd21, sd21_base, sdxl, or shapes: the bundled model, which is not random")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    from slimstep.prune.family import make_family  # here, since --help needs none of it

    try:
        family = make_family(options.size, options.folder)
    except (ValueError, OSError) as error:
        fail(one_line(error))
    for name, folder in family.items():
        print(name, folder)


if __name__ == "__main__":
    open_console()
    main()
