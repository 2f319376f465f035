"""What sections of the configuration check their values with."""

import math
from collections.abc import Collection
from typing import Any


def check_minimum(section: str, config: Any, least: int, *names: str) -> None:
    """ValueError for values of a section that are below `least`, or that are no number."""
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{section}: {name}={getattr(config, name)} must be at least {least}")


def check_choice(section: str, config: Any, **known: Collection[Any]) -> None:
    """ValueError for values of a section that are none of the known ones."""
    for name, choices in known.items():
        if (value := getattr(config, name)) not in choices:
            raise ValueError(f"{section}.{name}={value!r} is unknown; choose from {', '.join(map(str, choices))}")


def check_not_negative(key: str, **values: float) -> None:
    """ValueError for values below zero, or that are no number."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{key}.{name}={value} must be at least 0")


def check_fraction(key: str, **values: float) -> None:
    """ValueError for values that are no fractions of 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{key}.{name}={value} must lie between 0 and 1")


def as_table(name: str, value: Any) -> dict:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name}={value} must be a table, as {{steps-8: {{teacher: teacher, teacher_steps: 32}}}}")
    return value or {}
