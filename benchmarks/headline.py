"""The headline of README.md, from the file that the whole method left: benchmarks/whole-method/summary.json.

    python benchmarks/headline.py            # writes it between README's two `headline` comments

A test says where README and file differ, as others do for every interval and standard error of the docs.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
README, SUMMARY = ROOT / "README.md", ROOT / "benchmarks/whole-method/summary.json"
BLOCK = re.compile(r"(<!-- headline: .*? -->\n).*?(<!-- /headline -->\n)", re.DOTALL)
TEACHER = {"UNet": ("unet", ""), "decoder": ("vae", "decoder.")}


def headline(summary: Mapping[str, Any]) -> str:
    """The table of the student beside the teacher at several numbers of steps, and what is left of its parameters."""
    student = summary["student"]
    lines = [f"| teacher at | its CLIP ± se | student at {student['steps']} steps − teacher, paired [95 %] | "
             "times as fast [95 %] |", "|---|---|---|---|"]  # fmt: skip
    for row in summary["against"]:
        clip, difference, speed = row["clip"], row["difference"], row["speedup"]
        paired = f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"
        faster = f"{speed['ratio']:.1f} [{speed['low']:.1f}, {speed['high']:.1f}]"
        lines.append(f"| {row['steps']} steps | {clip['mean']:.2f} ± {clip['se']:.2f} | {paired} | {faster} |")
    unet, decoder = (student["parameters"][part] / whole for part, whole in teacher_parameters().items())
    clip, prompts = student["clip"], summary["against"][0]["difference"]["n"]
    lines += ["", f"The student has {unet:.1%} of the UNet's parameters, {decoder:.1%} of the decoder's, "
              f"and {student['steps']} steps: CLIP {clip['mean']:.2f} ± {clip['se']:.2f} on {prompts} prompts that no "
              "block was ranked on."]  # fmt: skip
    return "\n".join(lines).replace("%", " %").replace("95  %", "95 %").replace("-", "−").replace("|−−−", "|---") + "\n"


def teacher_parameters() -> dict[str, int]:
    """Of the bundled model's UNet and decoder, counted in its files."""
    return {part: count(ROOT / "assets/shapes" / folder, prefix) for part, (folder, prefix) in TEACHER.items()}


def count(folder: Path, prefix: str) -> int:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
    return sum(map(math.prod, shapes))


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = headline(json.loads(SUMMARY.read_text()))
    README.write_text(BLOCK.sub(lambda match: match[1] + text + match[2], README.read_text()))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
