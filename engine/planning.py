"""What a job answers under plan=true, in the place of working."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """text: what a job would do. hours: the wall time for which its networks have yet to work, on all processes."""

    text: str
    hours: float = 0.0


def duration(hours: float) -> str:
    """Hours in the unit people read: 3.4 h."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
