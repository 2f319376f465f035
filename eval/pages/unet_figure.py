"""The valued network: every block at its place in the U, coloured by what it is worth, with what became of it.

The blocks of a transformer stand in columns, in the order in which they run, and their attentions and feed-forwards,
where these are blocks too, beside them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from slimstep.engine.resolution import Resolution, printed, resolution_of, sides
from slimstep.eval.pages.figures import INK, MUTED, STUDENT, canvas, styled
from slimstep.eval.pages.runs import CLIP, Block, finite
from slimstep.eval.pages.text import decimals, digits, fixed, signed
from slimstep.models.architecture import (
    WHOLE,
    Architecture,
    BlockSpec,
    holder_of,
    holds,
    level_of,
    num_levels,
    repeats_of,
    unet_levels,
)

SIDES = ("down_blocks.", "mid_block.", "up_blocks.")
PER_COLUMN = 10  # of a transformer's blocks
BOX_W, BOX_H, GAP, INDENT, PITCH, MIDDLE = 1.0, 0.68, 0.07, 0.42, 1.0, 1.1
LEGEND_W = 6.2  # inches
LINE = BOX_H + GAP  # from a transformer's block to the next
VALUE_COLOURS = LinearSegmentedColormap.from_list(  # orange: free to remove; blue: worth its milliseconds
    "value", [(0, "#e8590c"), (0.25, "#ffc078"), (0.5, "#f4f5f7"), (0.62, "#bcdcf5"), (0.8, "#4a9fe0"), (1, "#0b4f94")]
)
UNSCORED = (0.79, 0.81, 0.84, 1.0)
HEAD = "-|>,head_width=0.18,head_length=0.35"
ARROW = {"arrowstyle": HEAD, "color": MUTED, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}


@styled
def unet_figure(
    blocks: Mapping[str, Block],
    architecture: Architecture,
    removed_in: Mapping[str, int] | None = None,
    latent_size: Resolution | None = None,
    metric: str = CLIP,
) -> Figure:
    """Every block's value at its place in the U; removed ones struck out (with the round), copied ones doubled,
    narrowed and quantized ones, and those that merge tokens, named.

    `metric`: what the values are of.
    """
    corners, levels = places(tuple(blocks)), num_levels(blocks)
    width = max(x for x, _ in corners.values()) + BOX_W
    lowest = levels or -min(y for _, y in corners.values()) / PITCH
    figure, (axes,) = canvas(max(0.98 * width + 1.2, LEGEND_W), 0.98 * (lowest + 1) * PITCH + 0.9)
    axes.set_axis_off()
    norm = value_norm(list(blocks.values()))
    repeats = {path: repeats_of(path, architecture, unet_levels(levels)) for path in blocks}
    draw_wiring(axes, corners, levels, latent_size)
    for path, corner in corners.items():
        layers = [(blocks[inner], repeats[inner]) for inner in blocks if holds(path, inner) and inner not in corners]
        notes = notes_of(architecture.get(path, WHOLE))
        draw_box(axes, corner, blocks[path], repeats[path], (removed_in or {}).get(path), norm, notes)
        draw_layers(axes, corner, layers, norm)
    axes.set_xlim(-0.75, width + 0.1)
    axes.set_ylim(-(lowest + 0.2) * PITCH, BOX_H + 0.14)
    axes.set_aspect("equal")
    if any(finite(b.clip_per_ms) for b in blocks.values()):
        is_recovered = any(finite(b.at_once) for b in blocks.values())
        draw_scale(figure, axes, norm, "CLIP score" if metric == CLIP else metric, is_recovered)
    return figure


def places(blocks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The lower left corner of each block's box: down on the left, the middle at the bottom, up on the right.

    Blocks come in order of execution, which runs left to right within a level. The layers of a UNet's transformers have
    no box.
    """
    paths = [path for path in blocks if holder_of(path, blocks) is None]
    levels = num_levels(paths)
    if not any(path.startswith(SIDES) for path in paths):
        return columns_of_lists(paths, blocks)
    rows: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        rows.setdefault((path.split(".")[0], level_of(path, levels)), []).append(path)
    step = BOX_W + GAP
    down, up = (
        max((len(row) * step + INDENT * level for (s, level), row in rows.items() if s == side), default=0)
        for side in ("down_blocks", "up_blocks")
    )
    right = down + MIDDLE + up
    corners = {}
    for (side, level), row in rows.items():
        if side == "down_blocks":
            x = INDENT * level
        elif side == "up_blocks":
            x = right - INDENT * level - len(row) * step
        else:
            x = down + MIDDLE / 2 - len(row) * step / 2
        corners |= {path: (x + k * step, -level * PITCH) for k, path in enumerate(row)}
    return corners


def columns_of_lists(paths: Sequence[str], blocks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The corners of a transformer's blocks: each list in columns of its own, equally long, of PER_COLUMN at most; the
    sublayers of a block, where they are blocks, stand beside it."""
    lines = [[path, *(inner for inner in blocks if holds(path, inner))] for path in paths]
    step = max(map(len, lines)) * (BOX_W + GAP) + INDENT
    lists: dict[str, list[list[str]]] = {}
    for line in lines:
        lists.setdefault(line[0].rpartition(".")[0], []).append(line)
    columns = [column for lines in lists.values() for column in in_columns(lines)]
    return {
        path: (n * step + k * (BOX_W + GAP), -y * LINE)
        for n, column in enumerate(columns) for y, line in enumerate(column) for k, path in enumerate(line)
    }  # fmt: skip


def in_columns(lines: Sequence[list[str]]) -> list[Sequence[list[str]]]:
    number = -(-len(lines) // PER_COLUMN)
    length = -(-len(lines) // number)
    return [lines[k : k + length] for k in range(0, len(lines), length)]


def value_norm(blocks: Sequence[Block]) -> FuncNorm:
    """Colours by the signed square root of CLIP lost per ms, so that one precious block does not bleach all others."""
    values = [abs(b.clip_per_ms) for b in blocks if finite(b.clip_per_ms)]
    top = max(values, default=1) or 1
    curve = (lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v))
    return FuncNorm(curve, vmin=-top, vmax=top)


Spans = dict[tuple[str, int], tuple[float, float]]


def rows_of(corners: Mapping[str, tuple[float, float]]) -> Spans:
    """{(side, level): (left end, right end)} of the rows of boxes."""
    spans: Spans = {}
    for path, (x, y) in corners.items():
        key = path.split(".")[0], round(-y / PITCH)
        left, right = spans.get(key, (x, x + BOX_W))
        spans[key] = min(left, x), max(right, x + BOX_W)
    return spans


def draw_wiring(
    axes: Axes, corners: Mapping[str, tuple[float, float]], levels: int, latent_size: Resolution | None
) -> None:
    """The order of execution down, through the middle and up; the skip connections; the resolution of each level."""
    spans = rows_of(corners)

    def arrow(start: tuple[float, float], end: tuple[float, float], **style) -> None:
        axes.annotate("", xytext=start, xy=end, arrowprops={**ARROW, **style})

    for level in range(levels):
        y = -level * PITCH
        size = f"level {level}"
        if latent_size:
            size = printed(resolution_of(*(side >> level for side in sides(latent_size))))
        axes.text(-0.12, y + BOX_H / 2, size, ha="right", va="center", fontsize=8, color=MUTED)
        down, up = spans.get(("down_blocks", level)), spans.get(("up_blocks", level))
        if down and up:
            arrow((down[1] + 0.08, y + BOX_H / 2), (up[0] - 0.08, y + BOX_H / 2), linestyle=(0, (3, 2)))
        if down and (below := spans.get(("down_blocks", level + 1))):
            x = below[0] + BOX_W / 2
            arrow((x, y - 0.02), (x, y - PITCH + BOX_H + 0.03))
        if up and (below := spans.get(("up_blocks", level + 1))):
            x = below[1] - BOX_W / 2
            arrow((x, y - PITCH + BOX_H + 0.02), (x, y - 0.03))
    middle = spans.get(("mid_block", levels))
    down, up = spans.get(("down_blocks", levels - 1)), spans.get(("up_blocks", levels - 1))
    if middle and down and up:
        y, top = -levels * PITCH + BOX_H / 2, -(levels - 1) * PITCH
        x_down, x_up = min(sum(down) / 2, middle[0] - 0.3), max(sum(up) / 2, middle[1] + 0.3)
        arrow((x_down, top - 0.02), (middle[0] - 0.04, y), connectionstyle="angle,angleA=-90,angleB=0,rad=5")
        arrow((middle[1] + 0.04, y), (x_up, top - 0.03), connectionstyle="angle,angleA=0,angleB=90,rad=5")


def colour_of(block: Block, norm: FuncNorm) -> tuple[float, float, float, float]:
    return VALUE_COLOURS(norm(block.clip_per_ms)) if finite(block.clip_per_ms) else UNSCORED


def ink_on(fill: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is read more easily (Rec. 709 luminance)."""
    return "#0f1114" if 0.2126 * fill[0] + 0.7152 * fill[1] + 0.0722 * fill[2] > 0.5 else "#ffffff"


def draw_box(
    axes: Axes, corner: tuple[float, float], block: Block, repeats: int, gone_in: int | None, norm: FuncNorm,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """One block: kind, CLIP lost ± se, milliseconds; `gone_in` is the number of the round that removed it."""
    (x, y), fill, alive = corner, colour_of(block, norm), repeats > 0

    def outline(shift: float, **style) -> None:
        shape = FancyBboxPatch((x + shift, y + shift), BOX_W, BOX_H, "round,pad=0,rounding_size=0.07", **style)
        axes.add_patch(shape)

    def text(dx: float, dy: float, words: str, size: float, **style) -> None:
        axes.text(x + dx, y + dy, words, fontsize=size, color=ink_on(fill) if alive else MUTED, **style)

    for k in reversed(range(1, min(repeats, 3))):  # copies peep out from behind
        outline(0.055 * k, facecolor=fill, edgecolor=INK, linewidth=0.9)
    if alive:
        outline(0, facecolor=fill, edgecolor=INK if repeats > 1 else MUTED, linewidth=0.9)
    else:
        outline(0, facecolor=(*fill[:3], 0.16), edgecolor=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.plot([x + 0.05, x + BOX_W - 0.05], [y + 0.05, y + BOX_H - 0.05], color=STUDENT, linewidth=1, alpha=0.6)
    kinds = {"resnets": "ResNet", "attentions": "attn", "single_transformer_blocks": "single"}
    holder, name = block.path.split(".")[-2:]
    label = f"{kinds.get(holder, 'block')} {name}" if name.isdecimal() else name
    note = f"  ×{repeats}" if repeats > 1 else f"  r{gone_in}" if gone_in is not None and not alive else ""
    note += "".join(f"  {own}" for own in notes) if alive else ""
    text(0.07, BOX_H - 0.06, f"{label}{note}", 6, ha="left", va="top")
    score = signed(block.delta_clip, decimals(block.se)) if finite(block.delta_clip) else "not scored"
    score = f"{signed(block.at_once, decimals(block.se))} → {score}" if finite(block.at_once) else score
    alone = finite(block.delta_clip) and not finite(block.at_once)
    text(BOX_W / 2, 0.335, score, 9 if alone else 7, ha="center", va="center", weight="bold")
    error = f"±{fixed(block.se)}" if finite(block.se) else ""
    time = f"{digits(block.ms)} ms" if finite(block.ms) else ""
    text(BOX_W / 2, 0.11, " · ".join(filter(None, (error, time))), 6.5, ha="center", va="center")


def notes_of(spec: BlockSpec) -> list[str]:
    """What a box says of a block beside its repeats."""
    said = "narrow" if spec.widths else None, spec.dtype, f"merge {spec.merge:.0%}" if spec.merge else None
    return [note for note in said if note]


def draw_layers(axes: Axes, corner: tuple[float, float], layers: Sequence[tuple[Block, int]], norm: FuncNorm) -> None:
    """The (block, repeats) of a transformer's layers, where they are blocks, as a strip of cells under its box."""
    width = BOX_W / max(len(layers), 1)
    for k, (layer, repeats) in enumerate(layers):
        x, y = corner[0] + k * width, corner[1] - 0.13
        fill = colour_of(layer, norm)
        style = {"facecolor": fill if repeats else (*fill[:3], 0.25), "edgecolor": MUTED, "linewidth": 0.5}
        axes.add_patch(Rectangle((x, y), width, 0.11, **style))
        if not repeats:
            axes.plot([x, x + width], [y, y + 0.11], color=STUDENT, linewidth=0.8)


def draw_scale(figure: Figure, axes: Axes, norm: FuncNorm, metric: str, is_recovered: bool) -> None:
    """The colour bar, labelled with true values of what is lost per millisecond."""
    recovered = ", at once → after local recovery" if is_recovered else ""
    bar = figure.colorbar(ScalarMappable(norm, VALUE_COLOURS), ax=axes, orientation="horizontal", shrink=0.42,
                          aspect=42, pad=0.02)  # fmt: skip
    bar.outline.set_visible(False)
    ticks = [sign * share * norm.vmax for sign, share in ((-1, 1), (-1, 0.25), (1, 0), (1, 0.25), (1, 1))]
    bar.set_ticks(ticks, labels=[signed(tick, decimals(abs(tick), least=1)) if tick else "0" for tick in ticks])
    bar.ax.tick_params(labelsize=7, length=0)
    bar.ax.grid(False)
    bar.set_label(
        f"colour: {metric} lost per millisecond saved (orange: free to remove, blue: worth its time)\n"
        f"in a box: {metric} lost without the block{recovered} ± standard error · its milliseconds\n"
        "struck out: removed, r0 in round 0; doubled: copied; narrow: parts of it lost units;\n"
        "int8, fp8: its linear layers compute so; merge: its self-attention merges tokens",
        fontsize=8,
    )
