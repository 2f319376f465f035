"""What sections of the configuration check their values with."""

import math
from typing import Any


def at_least(section: str, config: Any, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{section}: {name}={getattr(config, name)} must be at least {least}")


def as_table(name: str, value: Any) -> dict:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name}={value} must be a table, as {{steps-8: {{teacher: teacher, teacher_steps: 32}}}}")
    return value or {}
