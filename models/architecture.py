"""The rule of an architecture: how often each block of a network runs, and which blocks go along with which.

An architecture is a table {block path: BlockSpec} of what differs from the whole network; a plain int stands for a
block's `repeats`. 0 removes the block, 1 keeps it (and is not written down), 2 and more repeat it: the copies live at
`<block>.copies.0`, … and run after it. A removed block takes along what it holds: a transformer its layers, and a level
of a UNet both its ways and the middle.

Network, search, latency table and pages share this file. It imports the standard library alone, so that reading results
loads no torch, and exports carry it inside their class file (models/families/prunable.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType

MOST_REPEATS = 256  # of a block: thousands of copies would be built for hours before anything is said of them
DTYPES = ("int8", "fp8")  # what the linear layers of a block may compute in
MOST_MERGED = 0.75  # of the tokens: one of four is what others are merged into


@dataclass(frozen=True)
class BlockSpec:
    """What becomes of one block: how often it runs, {part: share of its width that stays} (families/widths.py; 0 leaves
    the part out alone), what its linear layers compute in (families/quantized.py; None: as the rest of the network),
    and the share of tokens that its self-attention merges (families/merged.py)."""

    repeats: int = 1
    widths: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None
    merge: float = 0.0


WHOLE = BlockSpec()
Architecture = dict[str, BlockSpec]
Levels = Mapping[str, tuple[str, ...]]
NO_LEVELS: Levels = MappingProxyType({})


# ---- reading and writing ----


def as_architecture(table: Mapping[str, int | Mapping | BlockSpec]) -> Architecture:
    """The table with a BlockSpec for every int and dict; ValueError names a block whose entry is none."""
    return {block: as_spec(block, entry) for block, entry in table.items()}


def as_spec(block: str, entry: int | Mapping | BlockSpec) -> BlockSpec:
    names = tuple(f.name for f in fields(BlockSpec))
    if isinstance(entry, Mapping):
        if unknown := sorted(set(entry) - set(names)):
            raise ValueError(f"the architecture gives {block} unknown fields {unknown}; a block has {names}")
        entry = BlockSpec(**entry)
    spec = entry if isinstance(entry, BlockSpec) else BlockSpec(entry)
    check_repeats(block, spec.repeats)
    fits = {
        "widths": isinstance(spec.widths, Mapping) and all(map(is_share, spec.widths.values())),
        "dtype": spec.dtype in (None, *DTYPES),
        "merge": is_share(spec.merge) and spec.merge <= MOST_MERGED,
    }
    for name in (name for name, fit in fits.items() if not fit):
        ways = f"widths are {{part: share from 0 to 1}}, dtype is one of {DTYPES}, merge a share up to {MOST_MERGED}"
        raise ValueError(f"the architecture gives {block} {name}={getattr(spec, name)!r}; {ways}")
    return spec


def is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def check_repeats(block: str, repeats: object, most: int = MOST_REPEATS) -> None:
    """ValueError for a number that no network is built with: a table, or a config.json, may hold any."""
    if type(repeats) is not int or not 0 <= repeats <= most:
        more = f", 2 to {most} repeat a block" if most > 1 else ", and a level is not repeated"
        raise ValueError(f"the architecture gives {block} repeats={repeats!r}; 0 removes, 1 keeps{more}")


def as_json(architecture: Architecture) -> dict[str, int | dict]:
    """The table as files hold it: a plain int where a spec is only repeats, else the fields that it changes."""
    return {block: spec_json(spec) for block, spec in architecture.items()}


def spec_json(spec: BlockSpec) -> int | dict:
    changed = {name: value for name, value in asdict(spec).items() if value != getattr(WHOLE, name)}
    return spec.repeats if changed.keys() <= {"repeats"} else changed


# ---- which block holds which ----


def unet_levels(num_levels: int) -> Levels:
    """{level: path prefixes that go along with it} of a UNet, from the inside out: both its ways, and the middle."""
    return {
        f"down_blocks.{i}": (f"down_blocks.{i}.", f"up_blocks.{num_levels - 1 - i}.", "mid_block.")
        for i in reversed(range(num_levels))
    }


def num_levels(blocks: Iterable[str]) -> int:
    """How many levels of resolution the UNet with these blocks has."""
    return 1 + max((int(block.split(".")[1]) for block in blocks if block.startswith("down_blocks.")), default=-1)


def level_of(block: str, num_levels: int) -> int:
    """The level of resolution that a block of a UNet lies in, 0 the outermost; that of the middle is below all."""
    side, index = block.split(".")[:2]
    if side == "mid_block":
        return num_levels
    return int(index) if side == "down_blocks" else num_levels - 1 - int(index)


def holds(holder: str, block: str, levels: Levels = NO_LEVELS) -> bool:
    """Whether a block lies within another, or goes along with a level."""
    return block.startswith((f"{holder}.", *levels.get(holder, ())))


def nested(block: str, other: str) -> bool:
    """Whether one of the two blocks holds the other."""
    return holds(block, other) or holds(other, block)


def holder_of(block: str, blocks: Iterable[str]) -> str | None:
    """The innermost of the blocks that this one lies within."""
    return max((other for other in blocks if holds(other, block)), key=len, default=None)


# ---- what the table says ----


def is_removed(block: str, architecture: Architecture, levels: Levels = NO_LEVELS) -> bool:
    """Whether a block, or what holds it, is removed."""
    gone = (name for name, spec in architecture.items() if spec.repeats == 0)
    return any(name == block or holds(name, block, levels) for name in gone)


def repeats_of(block: str, architecture: Architecture, levels: Levels = NO_LEVELS) -> int:
    """How often a block runs; 0 where it, or what holds it, is removed."""
    return 0 if is_removed(block, architecture, levels) else architecture.get(block, WHOLE).repeats


def kept(blocks: Iterable[str], architecture: Architecture, levels: Levels = NO_LEVELS) -> tuple[str, ...]:
    """The blocks that are not removed, in their order."""
    return tuple(block for block in blocks if not is_removed(block, architecture, levels))


def copies(block: str, architecture: Architecture) -> list[str]:
    """The paths of a block's copies, in order of execution."""
    return [f"{block}.copies.{k}" for k in range(repeats_of(block, architecture) - 1)]


def instances(block: str, architecture: Architecture, holder: str | None) -> Iterator[str]:
    """The path of a block and, where another holds it, those of its twins in the holder's copies."""
    yield block
    if holder:
        yield from (f"{path}{block.removeprefix(holder)}" for path in copies(holder, architecture))


def remove(architecture: Architecture, block: str) -> Architecture:
    """The table without the block."""
    return {**architecture, block: BlockSpec(0)}


def repeat(architecture: Architecture, block: str) -> Architecture:
    """The table with one more run of the block."""
    spec = architecture.get(block, WHOLE)
    return {**architecture, block: replace(spec, repeats=spec.repeats + 1)}


def narrowed(architecture: Architecture, block: str, part: str, share: float) -> Architecture:
    """The table with a part of the block at a share of its width."""
    spec = architecture.get(block, WHOLE)
    return {**architecture, block: replace(spec, widths={**spec.widths, part: share})}


def with_dtype(architecture: Architecture, block: str, dtype: str) -> Architecture:
    """The table with the block's linear layers in another dtype."""
    return {**architecture, block: replace(architecture.get(block, WHOLE), dtype=dtype)}


def with_merge(architecture: Architecture, block: str, share: float) -> Architecture:
    """The table with a share of the tokens merged in the block's self-attention."""
    return {**architecture, block: replace(architecture.get(block, WHOLE), merge=share)}


def action_on(part: str | None) -> str:
    """What records call a change of a part of a block, of its dtype or merged tokens; None: of the block itself."""
    return {None: "remove", "dtype": "quantize", "merge": "merge"}.get(part, "narrow")


def departures(spec: BlockSpec) -> list[str]:
    """What no class of diffusers has of a block that runs: it is narrowed, quantized to int8, or merges tokens."""
    quantized, merges = [f"quantized to {spec.dtype}"] if spec.dtype else [], ["merging tokens"] if spec.merge else []
    return [*(["narrowed"] if spec.widths else []), *quantized, *merges]


def without_defaults(architecture: Architecture) -> Architecture:
    """The table without entries of blocks, and parts of them, that stay as they are."""
    specs = {block: without_whole_parts(spec) for block, spec in architecture.items()}
    return {block: spec for block, spec in specs.items() if spec != WHOLE}


def without_whole_parts(spec: BlockSpec) -> BlockSpec:
    """The entry without parts that keep their width; of a removed block nothing but that it is."""
    if spec.repeats == 0:
        return BlockSpec(0)
    return replace(spec, widths={part: share for part, share in spec.widths.items() if share != 1})


def canonical(
    architecture: Architecture,
    blocks: tuple[str, ...],
    levels: Levels = NO_LEVELS,
    copyable: Iterable[str] | None = None,
) -> Architecture:
    """The table in order of execution, without entries that say nothing: of whole blocks, and of what a removed one
    holds. `levels` can go as a whole, from the inside out; `copyable` blocks (None: all) can have repeats above 1.

    Raises ValueError for an architecture that no network of these blocks has.
    """
    names = (*blocks, *levels)
    if unknown := sorted(set(architecture) - set(names)):
        raise ValueError(f"the architecture names unknown blocks {unknown}; this network has {names}")
    for name, spec in architecture.items():
        check_repeats(name, spec.repeats, 1 if name in levels else MOST_REPEATS)
        if spec.repeats > 1 and copyable is not None and name not in copyable:
            why = "a ResNet whose channels change" if ".resnets." in name else "whose text nothing would give on"
            why = why if copyable else "of whose class nobody knows a copy that changes nothing"
            reason = f"copies {name}, {why}; these can be copied: {tuple(copyable)}"
            raise ValueError(f"the architecture {reason}")
    gone = [level for level in levels if is_removed(level, architecture)]
    if gone != list(levels)[: len(gone)]:
        raise ValueError(f"the architecture removes the levels {gone}; levels go from the inside out: {tuple(levels)}")
    removed = [name for name, spec in architecture.items() if spec.repeats == 0]
    stated = (n for n in names if n in architecture and not any(holds(other, n, levels) for other in removed))
    return without_defaults({name: architecture[name] for name in stated})
