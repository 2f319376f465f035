"""Which channels of the decoder to keep, and which latents to teach it on? Half-width decoders side by side.

    python benchmarks/decoder_table.py --root runs/decoders

Every row is the decoder job on the shipped model, judged on the same held-out latents. The first rows differ in how
channels are chosen, and are told before and after a short training; one in what happens to the groups of the norms; the
others in what they are trained on: latents that the teacher samples (as all above), encoded images, or half of each. To
--out go the table and every judgement. Started again, it continues.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.engine.files import write_json, write_text
from slimstep.eval.pages.runs import read_json
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.pages.vae_page import measures

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS = {
    **{f"{choice}": [f"decoder.choice={choice}"] for choice in ("magnitude", "taylor", "energy", "random", "first")},
    "thinned norm groups": ["decoder.norm_groups=thinned"],
    "real latents": ["latents.real_share=1"],
    "half real": ["latents.real_share=0.5"],
}
HEADER = ["run", "decoder", "CLIP against the wide one", "sampled latents: PSNR", "SSIM", "features",
          "real latents: PSNR", "SSIM", "features", "to the real image: PSNR"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/decoders"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/decoder-table"), help="where the results go")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of every row")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to run")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all rows")
    options = parser.parse_args()
    for name in options.only:
        command = [
            sys.executable, str(REPOSITORY / "train.py"), "+experiment=prune_vae", f"root={options.root}",
            f"name={name.replace(' ', '-')}", f"train.steps={options.steps}", "latency.iterations=2",
            "decoder.batches=[1]", *ROWS[name], *options.overrides,
        ]  # fmt: skip
        print("$", " ".join(command), flush=True)
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if not os.path.exists("/dev/nvidia0") else {}
        if code := subprocess.run(command, env={**os.environ, **on_cpu}).returncode:
            sys.exit(f"{name} failed with exit code {code}; the same command continues")
        write_results(options)


def write_results(options: argparse.Namespace) -> None:
    """The table and the judgements of the rows that are finished."""
    found = {name: read_json(options.root / name.replace(" ", "-") / "evaluation.json") for name in options.only}
    done = {name: evaluation for name, evaluation in found.items() if evaluation}
    rows = [cells(name, decoder) for name, evaluation in done.items() for decoder in evaluation["decoders"][1:]]
    write_text(options.out / "table.md", markdown_table(HEADER, rows))
    first = next(iter(done.values()))
    facts = {key: first[key] for key in ("n", "n_real", "widths", "prompts_hash", "protocol", "environment")}
    decoders = {name: [rounded(decoder) for decoder in evaluation["decoders"]] for name, evaluation in done.items()}
    write_json(options.out / "results.json", {**facts, "steps": options.steps, "decoders": decoders})
    print(markdown_table(HEADER, rows), flush=True)


def cells(name: str, decoder: dict) -> list[str]:
    d, near = decoder["versus_wide"], decoder["nearness"]
    versus = f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
    told = {"sliced": "before training", "narrow": "after"}[decoder["name"]]
    to_wide = [*measures(near["sampled_to_wide"]), *measures(near["real_to_wide"])]
    return [name, told, versus, *to_wide, measures(near["real_to_image"])[0]]


def rounded(decoder: dict) -> dict:
    """A judgement with its per-item values to what matters, for a file that is kept."""
    clip = {**decoder["clip"], "per_prompt": [round(value, 3) for value in decoder["clip"]["per_prompt"]]}
    near = {
        key: value and {name: {**m, "per_item": [round(x, 4) for x in m["per_item"]]} for name, m in value.items()}
        for key, value in decoder["nearness"].items()
    }
    return {**decoder, "clip": clip, "nearness": near}


if __name__ == "__main__":
    open_console()
    main()
