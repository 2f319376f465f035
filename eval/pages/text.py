"""Numbers and names as pages and tables write them, and what they say of prompts. No library is loaded for it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

MOST_PLACES = 4
ERRORS_IN_INTERVAL = 2 * 1.96  # of 95 %

# {key of an evaluation's `seen`, the number of such prompts: what they were seen as}
SEEN = {
    "prompts_in_training": "captions that were trained on",
    "prompts_in_calibration": "prompts that blocks were ranked on",
    "prompts_in_training_split": "captions of the data's training images",
}


def digits(value: float) -> str:
    """Three significant digits, without an exponent: 0.0567, 1.23, 12.3, 1234."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def signed(value: float, places: int = 2) -> str:
    """With its sign, and a minus that is as wide as the plus."""
    return f"{value:+.{places}f}".replace("-", "−")


def decimals(error: float | None, least: int = 2) -> int:
    """The decimals that show the first digit of a standard error: scores have it in the first or second, squared errors
    of pictures far behind."""
    known = error is not None and math.isfinite(error) and error > 0
    return max(least, min(MOST_PLACES, -math.floor(math.log10(error)))) if known else least


def fixed(error: float | None) -> str:
    """A standard error with these decimals."""
    return "–" if error is None else f"{error:.{decimals(error)}f}"


def score(measured: Mapping[str, Any] | None, least: int = 2) -> str:
    """A mean and its standard error; a dash for what was not measured."""
    shown = measured and decimals(measured["se"], least)
    return f"{measured['mean']:.{shown}f} ± {measured['se']:.{shown}f}" if measured else "–"


def difference(paired: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval; a dash for the reference itself."""
    if not paired:
        return "–"
    mean, low, high = paired["mean"], paired["low"], paired["high"]
    shown = decimals((high - low) / ERRORS_IN_INTERVAL)
    return f"{signed(mean, shown)} [{signed(low, shown)}, {signed(high, shown)}]"


def ratio(measured: Mapping[str, Any] | None) -> str:
    """A ratio with its interval; a dash for what was not measured."""
    return f"{measured['ratio']:.2f} [{measured['low']:.2f}, {measured['high']:.2f}]" if measured else "–"


def tile(label: str, value: str, note: str) -> dict[str, str]:
    """One of a page's few large numbers, with its explanation."""
    return {"label": label, "value": value, "note": note}


def size(count_bytes: float) -> str:
    """Bytes in the unit people read: 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}" if count_bytes else "–"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def count(value: int | None) -> str:
    """A number of parameters: 2.09 M, 859.5 M, 2.57 B."""
    if value is None:
        return "–"
    size, unit = next(((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if value >= s), (1, ""))
    return f"{value / size:.4g} {unit}".strip()


def display_name(name: str) -> str:
    return f"round {int(name.removeprefix('round-'))}" if name.startswith("round-") else name


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested tables."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}; lists as text."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return f"{value:.4g}" if isinstance(value, float) else value

    return {name: shown(value) for name, value in leaves(table)}


def overlap_sentence(n: int, seen: Mapping[str, int]) -> str:
    """What an evaluation says of its `n` prompts; empty where it says nothing, as those of older runs."""
    known = {what: seen[key] for key, what in SEEN.items() if seen.get(key) is not None}
    if not known:
        return ""
    if not any(known.values()):
        return f"None of the {n} prompts is among the {' or the '.join(known)}."
    sentence = "; ".join(f"{count} of the {n} prompts are among the {what}" for what, count in known.items())
    return f"{sentence}: the scores say less of new prompts."
