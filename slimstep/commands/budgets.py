"""What a pruning run would remove for other budgets: slimstep budgets runs/prune_unet --fractions 0.85 0.7 0.55

From the block scores and the latency table that the run has measured, in seconds, by Algorithm 1 and by the integer
program. --write FILE keeps the program's network of the last budget, for

    train.py +experiment=prune_unet search=manual search.method.architecture=FILE
"""

import argparse
import sys
from pathlib import Path

from slimstep.engine.quiet import one_line

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5)


def main() -> int:
    """Prints the table; returns the exit code, 1 where the run has scored no blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run directory of prune_unet or prune_transformer")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of the teacher's latency")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the last network of the program goes")
    options = parser.parse_args()
    from slimstep.engine.files import write_json  # here, since --help needs none of it
    from slimstep.prune.budgets import budgets_table, choices, read_first_round

    try:
        measured = read_first_round(options.run)
        found = choices(measured, options.fractions)
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(budgets_table(found).console)
    if options.write:
        write_json(options.write, measured.after(found[-1]))
        print(options.write.resolve())
    return 0
