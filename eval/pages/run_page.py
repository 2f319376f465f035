"""The report of a run: one self-contained HTML page, and its pictures as PNG beside it.

It is drawn from the run's files alone, so it can be made at any time, of a run that is under way as well; a section
whose files do not exist yet is left out, and the page says what is missing.
"""

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slimstep.eval.pages.evaluation_page import by_ratio, further_scores
from slimstep.eval.pages.figures import (
    STEP,
    STUDENT,
    TEACHER,
    ChangePoint,
    Point,
    additivity_figure,
    budgets_figure,
    changes_figure,
    evolution_figure,
    grid_figure,
    pareto_figure,
)
from slimstep.eval.pages.html import Pair, pairs, write_page
from slimstep.eval.pages.runs import CLIP, Model, Round, RunRecord, ranked_by, read_run
from slimstep.eval.pages.text import count, digits, display_name, flatten, overlap_sentence, percent, signed, tile
from slimstep.eval.pages.unet_figure import unet_figure
from slimstep.models.architecture import DTYPES, action_on, kept

MOST_PANELS = 3  # rounds whose changes are drawn, the last ones
KINDS = {"teacher": ("teacher", TEACHER), "student": ("student", STUDENT)}


def write_report(folder: str | Path) -> Path:
    """Makes `folder`/report.html and `folder`/report/*.png anew from what the run has written so far.

    Raises FileNotFoundError where `folder` is no run.
    """
    run = read_run(folder)
    further = further_scores(run.models)
    return write_page(
        run.path,
        "run.html.j2",
        draw_figures(run),
        saved_alone=("images",),
        run=run,
        headline=headline(run),
        seen=overlap_sentence(run.evaluation.n, run.evaluation.seen) if run.evaluation else "",
        tiles=tiles(run),
        further=further,
        rows=[model_row(model, run.models[0], run.predicted if run.ranked_by == CLIP else {}) for model in run.models],
        pictures=pictures(run),
        recovered=recovered_sentence(run),
        additive=(first_latency(run) or {}).get("additive_error"),
        facts=facts(run),
    )


# ---- what the page says ----


def headline(run: RunRecord) -> str:
    """The outcome in a sentence; what is missing, if the run has not come to its end."""
    if not run.evaluation:
        decided = sum(r.decision is not None for r in run.rounds)
        return f"This run is under way: {decided} of its rounds are decided, and the models have not been compared yet."
    teacher, student = run.models[0], run.models[-1]
    versus = student.versus_reference
    outcome = "cannot be distinguished from its teacher's on these prompts"
    if versus["low"] > 0 or versus["high"] < 0:
        outcome = f"is {abs(versus['mean']):.2f} {'above' if versus['low'] > 0 else 'below'} its teacher's"
    time, size = (percent(getattr(student, key) / getattr(teacher, key)) for key in ("ms", "parameters"))
    return (
        f"The student takes {time} of the teacher's denoiser time ({digits(student.ms)} of {digits(teacher.ms)} ms) "
        f"and has {size} of its parameters. Its CLIP score {outcome}."
    )


def recovered_sentence(run: RunRecord) -> str:
    """What local recovery is, and how it changed the first round's ranking; empty where there was none."""
    recovery = next((r.scores["recovery"] for r in run.rounds if r.scores and "recovery" in r.scores), None)
    if recovery is None:
        return ""
    agreement = recovery["rank_agreement_with_before"]
    ranked = "" if agreement is None else f" Both rank the first round's changes alike with ρ = {agreement:.2f}."
    steps = recovery["steps"]
    return f"The first value is lost at once, the second after {steps} steps of training of its neighbours.{ranked}"


def tiles(run: RunRecord) -> list[dict[str, str]]:
    """The page's few large numbers: label, value, explanation."""
    if not run.evaluation:
        return []
    teacher, student = run.models[0], run.models[-1]
    versus, blocks = student.versus_reference, run.latest_blocks
    num_kept = len(kept(blocks, run.architecture, run.levels))
    copied = sum(spec.repeats > 1 for spec in run.architecture.values())
    specs = run.architecture.values()
    others = {"narrowed": sum(bool(spec.widths) for spec in specs), "merging": sum(spec.merge > 0 for spec in specs),
              **{f"in {dtype}": sum(spec.dtype == dtype for spec in specs) for dtype in DTYPES}}  # fmt: skip
    changed = "".join(f", {number} {how}" for how, number in others.items() if number)
    interval = f"{signed(versus['low'])} to {signed(versus['high'])} (95 %)"
    shares = (
        ("denoiser time", attrgetter("ms"), digits, " ms"),
        ("parameters", attrgetter("parameters"), count, ""),
        ("GFLOPs", attrgetter("gflops"), digits, ""),
    )
    return [
        *(tile(label, percent(of(student) / of(teacher)), f"{form(of(student))} of {form(of(teacher))}{unit}")
          for label, of, form, unit in shares),
        tile("blocks kept", f"{num_kept} / {len(blocks)}", f"{copied} copied{changed}"),
        tile("CLIP, paired", signed(versus["mean"]), interval),
        *(ratio_tile(name, over) for name in by_ratio(run.models)
          if (over := (student.metrics[name] or {}).get("ratio_to_reference"))),
    ]  # fmt: skip


def ratio_tile(metric: str, over: Mapping[str, float]) -> dict[str, str]:
    within = f"{percent(over['low'])} to {percent(over['high'])} (95 %)"
    return tile(f"{metric}, of the teacher's", percent(over["ratio"]), within)


def model_row(model: Model, teacher: Model, predicted: Mapping[str, float]) -> dict[str, Any]:
    """A model's line of the table; predicted: the CLIP difference of each round."""
    return {
        "name": display_name(model.model),
        "kind": KINDS.get(model.model, ("step",))[0],
        "share": model.ms / teacher.ms,
        "psnr": model.mean("psnr"),
        "versus_teacher": model.versus_reference,
        "predicted": predicted.get(model.model),
        "model": model,
        **{key: getattr(model, key) for key in ("parameters", "gflops", "ms", "clip")},
    }


def facts(run: RunRecord) -> dict[str, dict[str, Any]]:
    """Protocols and environment: title -> {name: value}, nested values flattened."""
    scores = next((r.scores for r in reversed(run.rounds) if r.scores), None)
    ranking = (
        {**scores["protocol"], "agreement of halves (ρ)": scores.get("rank_agreement_of_halves"),
         **({"local recovery": scores["recovery"]} if "recovery" in scores else {})} if scores else {}
    )
    left_out, done = ("sites", "narrower", "samples"), run.evaluation
    evaluated = {**done.protocol, "prompts_hash": done.prompts_hash, "n": done.n, **done.seen} if done else {}
    tables = {
        "Evaluation": evaluated,
        "Block scores": ranking,
        "Latency": {k: v for k, v in (first_latency(run) or {}).items() if k not in left_out},
        "Environment": run.evaluation.environment if run.evaluation else {},
    }
    flat = {title: flatten(table) for title, table in tables.items()}
    return {title: table for title, table in flat.items() if any(value is not None for value in table.values())}


# ---- what the page shows ----


def draw_figures(run: RunRecord) -> dict[str, Figure]:
    """{name: figure} of all that the run's files allow."""
    figures = {}
    if blocks := run.latest_blocks:
        timed = first_latency(run)
        figures["blocks"] = unet_figure(blocks, run.architecture, run.removed_in, timed and timed.get("latent_size"),
                                       run.ranked_by)  # fmt: skip
    if changes := {display_name(r.name): found for r in run.rounds if r.decision and (found := scored_changes(r))}:
        figures["changes"] = changes_figure(dict([*changes.items()][-MOST_PANELS:]), run.ranked_by)
    if budgets := next((r.budgets for r in run.rounds if r.budgets), None):
        figures["budgets"] = budgets_figure(budgets, run.ranked_by)
    if len(points := stages(run)) > 1:
        predicted = {r.name: r.decision["predicted_ms"] for r in run.rounds if r.decision} if run.evaluation else {}
        target = next((r.decision["target_ms"] for r in reversed(run.rounds) if r.decision), None)
        figures["evolution"] = evolution_figure(points, target, [predicted.get(m.model) for m in run.models] or [None])
        figures["pareto"] = pareto_figure(points)
    if (timed := first_latency(run)) and "samples" in timed:  # a table made elsewhere may hold nothing but its entries
        figures["additivity"] = additivity_figure(timed["samples"])
    ends = [name for name in ("teacher", "student") if run.images.get(name)]
    if ends and run.prompts:
        figures["images"] = grid_figure([(name, run.images[name]) for name in ends], run.prompts)
    return figures


def scored_changes(r: Round) -> list[ChangePoint]:
    """All changes that the round scored, with what it took of them."""
    place = lambda of: (of["site"], of.get("part"), of.get("share"))  # noqa: E731
    taken = {place(action) for action in r.decision["actions"] if action["action"] != "copy"}
    return [
        ChangePoint(value["saved_ms"], value["delta_clip"], value["se"] or 0.0, action_on(value.get("part")),
               place(value) in taken, value.get("at_once"))
        for value in r.decision.get("values", ()) if value["delta_clip"] is not None and value["saved_ms"] is not None
    ]  # fmt: skip


def first_latency(run: RunRecord) -> dict[str, Any] | None:
    """The latency table of the teacher's architecture."""
    return next((r.latency for r in run.rounds if r.latency), None)


def stages(run: RunRecord) -> list[Point]:
    """The models from teacher to student; before the evaluation, the network as it was before each round."""
    if run.evaluation:
        points = []
        for m in run.models:
            kind, colour = KINDS.get(m.model, ("step", STEP))
            points.append(Point(display_name(m.model), m.ms, m.clip["mean"], m.clip["se"], kind, colour))
        return points
    by_clip = [r for r in run.rounds if r.latency and r.scores and ranked_by(r.scores) == CLIP]
    scored = [(f"before {display_name(r.name)}", r) for r in by_clip]
    return [
        Point(label, r.latency["full_ms"], r.scores["base"]["clip"], r.scores["base"]["se"], "step", STEP)
        for label, r in scored
    ]


def pictures(run: RunRecord) -> list[Pair]:
    """Teacher and student, prompt by prompt."""
    return pairs({name: run.images[name] for name in ("teacher", "student") if run.images.get(name)}, run.prompts)
