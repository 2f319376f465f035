"""The few numbers of a page that matter: the fastest model that is not worse, and what optimising came to."""

from collections.abc import Mapping
from typing import Any

from slimstep.eval.pages.gathered import Gathered
from slimstep.eval.pages.pareto import speedup
from slimstep.eval.pages.results import Row, setting, setting_text
from slimstep.eval.pages.speed_page import rows_that_ran
from slimstep.eval.pages.text import difference, digits, ratio, tile

Tile = Mapping[str, str]


def headline(gathered: Gathered) -> str:
    """The outcome in a sentence or two."""
    said = [evaluation_sentence(gathered)] if gathered.evaluations else []
    for name, results in gathered.of_kind("cumulative").items():
        if last := last_kept(results):
            faster = f"{last['speedup']['first']['ratio']:.2f} times as fast as its first row"
            said.append(f"The last row kept on {name}, {last['name']}, is {faster}.")
    return " ".join(said) or "Times from the prompt's text to 8-bit images."


def evaluation_sentence(gathered: Gathered) -> str:
    reference = gathered.reference
    base = f"{reference.label} at {setting_text(setting(reference))}"
    if gathered.reference_time(reference) is None:
        untimed = "the reference was not timed" if gathered.timed else "no model was timed"
        return f"CLIP scores against {base}; {untimed} at its steps and guidance scale, so there are no speed-ups."
    best = leader(gathered)
    if best is None:
        return f"No other point timed at guidance {reference.guidance:g} is faster than {base}."
    versus = best.versus_reference
    fate = (
        "no loss of CLIP score can be shown"
        if fastest_not_worse(gathered)
        else "like every faster one, it loses CLIP score"
    )
    return (
        f"{best.label} at {best.steps} steps draws an image {speed_of(gathered, best)} as fast as {base}; {fate}: "
        f"{difference(versus)}, paired over {versus['n']} prompts."
    )


def leader(gathered: Gathered) -> Row | None:
    """The fastest point that is not worse than the reference, or else, where all that are faster are, the fastest."""
    return fastest_not_worse(gathered) or next(iter(faster_points(gathered)), None)


def faster_points(gathered: Gathered) -> list[Row]:
    """The timed points at the reference's guidance scale that take less time than it, fastest first."""
    reference = gathered.reference
    candidates = [p for p in gathered.compared if p.guidance == reference.guidance and gathered.time(p)]
    faster = [p for p in candidates if gathered.time(p).ms < gathered.reference_time(reference).ms]
    return sorted(faster, key=lambda p: gathered.time(p).ms)


def fastest_not_worse(gathered: Gathered) -> Row | None:
    """The fastest point whose paired interval reaches zero."""
    return next((p for p in faster_points(gathered) if p.versus_reference["high"] >= 0), None)


def speed_of(gathered: Gathered, point: Row) -> str:
    return speedup(gathered.time(point), gathered.reference_time(point))


def last_kept(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the cumulative benchmark came to; None where nothing was built upon its first row."""
    return next((row for row in reversed(results["rows"]) if row["kept"] and "first" in row["speedup"]), None)


# ---- the large numbers ----


def tiles(gathered: Gathered) -> list[Tile]:
    """Label, value, explanation."""
    shown = evaluation_tiles(gathered) if gathered.evaluations else benchmark_tiles(gathered)
    for name, results in gathered.of_kind("cumulative").items():
        if last := last_kept(results):
            faster, interval = ratio(last["speedup"]["first"]).split(" ", 1)
            shown.append(tile(name, f"{faster}×", f"first row to last, 95 %: {interval}"))
    for name, results in gathered.of_kind("pipelines").items():
        if ran := rows_that_ran(results):
            best = max(ran, key=lambda row: row["its"])
            note = f"{best['model']}, {best['task']}, batch {best['batch']}, {best['mode']}"
            shown.append(tile(f"{name}, most it/s", digits(best["its"]), note))
    return shown


def evaluation_tiles(gathered: Gathered) -> list[Tile]:
    reference, clip = gathered.reference, gathered.reference.clip
    note = f"± {clip['se']:.2f}, {len(clip['per_prompt'])} prompts, {setting_text(setting(reference))}"
    shown = [tile(f"CLIP, {reference.label}", f"{clip['mean']:.2f}", note)]
    best = leader(gathered) if gathered.reference_time(reference) else None
    if best:
        name, versus = f"{best.label}, {best.steps} steps", difference(best.versus_reference)
        mean, interval = versus.split(" ", 1)
        times = f"{digits(gathered.time(best).ms)} of {digits(gathered.reference_time(best).ms)} ms an image"
        shown += [tile(f"CLIP, paired: {name}", mean, f"95 %: {interval}"),
                  tile(f"speed: {name}", speed_of(gathered, best), times)]  # fmt: skip
    return shown


def benchmark_tiles(gathered: Gathered) -> list[Tile]:
    """The fastest config of each benchmark, in units of its base."""
    shown = []
    for name, results in gathered.of_kind("benchmark").items():
        if ran := rows_that_ran(results):
            best = max(ran, key=lambda row: row["speedup"]["base"]["ratio"])
            faster, interval = ratio(best["speedup"]["base"]).split(" ", 1)
            shown.append(tile(f"{name}, × base", f"{faster}×", f"{best['model']}, {best['name']} {interval}"))
    return shown
