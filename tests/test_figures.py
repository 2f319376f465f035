"""Every figure of README, docs and benchmarks/README.md is in a file under benchmarks/.

An interval (`x [low, high]`) or a standard error (`x ± se`) has to be in some file, rounded as it is written; single
figures are listed with what they come from. docs/LOG.md tells of runs that left no file and is not looked at.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.headline import BLOCK, SUMMARY, headline, teacher_parameters

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "benchmarks"
DOCS = [ROOT / "README.md", FILES / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "LOG.md")]
NUMBER = r"[+−-]?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"([^\[|]{{0,40}})\[(?:quartiles )?({NUMBER}),\s*({NUMBER})\]")  # what stands before, low, high
ERROR = re.compile(rf"({NUMBER}) ± ({NUMBER})")


def prose(path: Path) -> str:
    """The text without code, emphasis and typographic minus signs."""
    return re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL).replace("*", "").replace("−", "-")


def same(value: float, written: str) -> bool:
    """Whether a value, rounded as the text is, is what is written; a loss may be told without its sign."""
    half = 0.5 * 10 ** -len(written.partition(".")[2])
    return abs(abs(value) - abs(float(written))) <= half + 1e-9


def same_pair(a: float, b: float, low: str, high: str) -> bool:
    return (same(a, low) and same(b, high)) or (same(a, high) and same(b, low))


def tables(x) -> Iterator[dict]:
    """All tables within a JSON value."""
    if isinstance(x, dict):
        yield x
    for part in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from tables(part)


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


@pytest.fixture(scope="module")
def known() -> tuple[list, list]:
    """Of all files: (low, high, values beside them) and (standard error, values beside it)."""
    intervals, errors = [], []
    for path in FILES.glob("*/*.json"):
        for table in tables(json.loads(path.read_text())):
            values = [value for value in table.values() if is_number(value)]
            pairs = [value for value in table.values() if isinstance(value, list) and len(value) == 2]
            pairs = [pair for pair in pairs if all(map(is_number, pair))]
            if is_number(table.get("low")) and is_number(table.get("high")):
                pairs.append([table["low"], table["high"]])
            intervals += [(*pair, values) for pair in pairs]
            errors += [(table["se"], values)] if is_number(table.get("se")) else []
    for path in FILES.glob("*/*.md"):
        if path.name != "README.md":
            for before, low, high in INTERVAL.findall(prose(path)):
                intervals.append((float(low), float(high), [float(x) for x in re.findall(NUMBER, before)]))
            errors += [(float(se), [float(x)]) for x, se in ERROR.findall(prose(path))]
    return intervals, errors


def without_a_file(text: str, known: tuple[list, list]) -> list[str]:
    """What is written of intervals and standard errors that no file holds."""
    intervals, errors = known
    lost = []
    for found in INTERVAL.finditer(text):
        before, low, high = found.groups()
        if not set(".+-") & set(low + high):
            continue  # [2, 3] is a range of settings
        fits = [values for a, b, values in intervals if same_pair(a, b, low, high)]
        numbers = re.findall(NUMBER, before)
        if not any(not numbers or any(same(value, x) for value in values for x in numbers) for values in fits):
            lost.append(found[0].strip())
    for found in ERROR.finditer(text):
        if not any(same(se, found[2]) and any(same(value, found[1]) for value in values) for se, values in errors):
            lost.append(found[0])
    return lost


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_intervals_and_errors_of_the_docs_are_in_a_file(path, known):
    assert without_a_file(prose(path), known) == []


def test_a_figure_that_is_in_no_file_is_found(known):
    text = (FILES / "whole-method/table.md").read_text().replace("−", "-")
    assert without_a_file(text, known) == []
    assert without_a_file(text.replace("7.42", "7.43"), known) == ["7.45 [7.43, 7.73]"] * 2
    assert without_a_file(text.replace("7.45", "7.46"), known) == ["7.46 [7.42, 7.73]"] * 2
    assert without_a_file(text.replace("83.22 ±", "83.21 ±"), known) == ["83.21 ± 0.54"] * 2


def test_the_headline_is_what_its_file_says():
    (block,) = BLOCK.finditer((ROOT / "README.md").read_text())
    assert block[0] == block[1] + headline(json.loads(SUMMARY.read_text())) + block[2], "run benchmarks/headline.py"


def load(name: str) -> dict:
    return json.loads((FILES / name).read_text())


def model(name: str, run: str = "snapfusion") -> dict:
    return next(x for x in load(f"prune-baselines/{run}.json")["models"] if x["name"] == name)


def share(run: str) -> float:
    """UNet time of a run's student over its teacher's, in per cent."""
    return 100 * model("student", run)["ms"] / model("teacher", run)["ms"]


def randoms(value) -> tuple[float, float]:
    values = sorted(value(f"random-{k}") for k in range(3))
    return values[0], values[-1]


def clip(run: str) -> float:
    return model("student", run)["clip"]["mean"]


def lost(run: str) -> float:
    return model("student", run)["versus_teacher"]["mean"]


def decoder(name: str) -> dict:
    return next(x for x in load("decoder/shapes.json")["decoders"] if x["name"] == name)


def near(name: str, kind: str, of: str) -> float:
    return decoder(name)["nearness"][of][kind]["mean"]


def point(model: str, steps: int) -> dict:
    return next(p for p in load("distill-table/points.json")["points"] if p["model"] == model and p["steps"] == steps)


def megabytes(work: str) -> float:
    rows = [row["own_peak_mib"] for row in load("memory-over-samples/results.json")["rows"] if row["work"] == work]
    return rows[-1] - rows[0]


def shapes(kind: str, wrong: str) -> float:
    return load("shapes-model/report.json")["told_apart"][kind][wrong]["accuracy"]


CLAIMS = {  # a text of README or of a page of docs: the values in it
    "evolved by slimstep | {:.0f} %": lambda: [share("snapfusion")],
    "cut to the same time | {:.0f} %": lambda: [share("bk_sdm")],
    "random removals (three) | {:.0f}–{:.0f} % | {:.1f} to {:.1f} | {:.0f} to {:.0f} |": lambda: [
        *randoms(share), *randoms(clip), *randoms(lost)],
    "(Spearman's ρ = {:.2f})": lambda: [load("prune-baselines/block-scores.json")["rank_agreement_of_halves"]],
    "/ {:.2f} / {:.2f} | +0.10 [−0.11, +0.30] / {:.2f} / {:.2f} | 1 |": lambda: [
        *(point("teacher", n)["clip"]["mean"] for n in (2, 1)),
        *(point("teacher", n)["versus_teacher"]["mean"] for n in (2, 1))],
    "| teacher decoder | {:.1f} k": lambda: [decoder("wide")["parameters"] / 1e3],
    "| pruned decoder | {:.1f} k": lambda: [decoder("narrow")["parameters"] / 1e3],
    "{:.1f} to {:.1f} GB of main memory with adafactor": lambda: [
        f(row["peak_gb"] for row in load("full-size-cpu/results.json")["rows"] if row["part"] != "scoring")
        for f in (min, max)],
    "(n = 1000, seed 1) | {:.3f} |": lambda: [load("shapes-model/report.json")["top1_of_100"]],
    "| VAE | PSNR of its reconstructions (n = 1000, seed 1) | {:.1f} dB": lambda: [
        load("shapes-model/report.json")["vae_psnr_db"]],
    "(n = 118 / 200 / 118, seed 1) | {:.3f} / {:.3f} / {:.3f} |": lambda: [
        shapes("real", wrong) for wrong in ("swapped colours", "wrong shape", "reversed relation")],
    "(n = 200 / 118 / 118 / 23) | {:.2f} / {:.2f} / {:.2f} / {:.2f}": lambda: [
        shapes("guidance 3", wrong)
        for wrong in ("wrong shape", "swapped colours", "reversed relation", "wrong count")],
    "100,000 samples, caching takes {:.0f} MiB more and training {:.0f} MiB more": lambda: [
        megabytes("cache"), megabytes("train")],
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_single_figures_are_what_their_files_say(claim):
    text = " ".join(" ".join(path.read_text() for path in DOCS).replace("*", "").split())
    assert claim.format(*CLAIMS[claim]()).replace("-", "−") in text.replace("-", "−")


def test_what_the_decoder_keeps_is_what_its_weights_say():
    assert decoder("wide")["parameters"] == teacher_parameters()["decoder"]
