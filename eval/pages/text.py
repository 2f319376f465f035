"""Numbers and names as pages and tables write them, and what they say of prompts. No library is loaded for it."""

from collections.abc import Mapping
from typing import Any

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


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[prefix + key] = ", ".join(map(str, value))
        else:
            flat[prefix + key] = f"{value:.4g}" if isinstance(value, float) else value
    return flat


def overlap_sentence(n: int, seen: Mapping[str, int]) -> str:
    """What an evaluation says of its `n` prompts; empty where it says nothing, as those of older runs."""
    known = {what: seen[key] for key, what in SEEN.items() if seen.get(key) is not None}
    if not known:
        return ""
    if not any(known.values()):
        return f"None of the {n} prompts is among the {' or the '.join(known)}."
    sentence = "; ".join(f"{count} of the {n} prompts are among the {what}" for what, count in known.items())
    return f"{sentence}: the scores say less of new prompts."
