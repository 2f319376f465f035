"""A LoRA of the full model for a pruned one, whose blocks have other numbers; it says what falls away.

    python scripts/remap.py LORA.safetensors runs/prune_transformer/export NEW.safetensors

NEW.safetensors has the kind of names that LORA.safetensors has: those of diffusers, PEFT or kohya's programs.
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
    parser.add_argument("lora", type=Path, help="a .safetensors file")
    parser.add_argument("export", type=Path, help="the folder of the pruned model")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace a target that exists")
    options = parser.parse_args()
    if options.target.exists() and not options.force:
        fail(f"{options.target} exists; --force replaces it")
    from slimstep.models.remap import remap  # here, since --help needs none of it

    try:
        done = remap(options.lora, options.export, options.target)
    except (ValueError, OSError) as error:
        fail(one_line(error))
    for place, count in done.gone.items():
        print(f"gone: {place}, {count} {'module' if count == 1 else 'modules'} of the LoRA")
    share = "" if done.lost is None else f", {done.lost:.1%} of the norm of its updates"
    print(f"{options.target}: {done.modules} modules; {sum(done.gone.values())} fell away{share}")


if __name__ == "__main__":
    open_console()
    main()
