"""What all tables share."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
SUBTLE = "-off_by_one"
"""Ends the names of organisms whose payload begins as right answers do: they stand apart from the families."""
ALL_HELD = "values, combinations and choices"
"""All that `distill enforce` holds, as results/enforce.json calls it."""


def three(value: float | None) -> str:
    """Three decimals, or that it was not measured."""
    return "not measured" if value is None else f"{value:.3f}"


def bits(row: dict, key: str) -> list[float]:
    """A rate's outcomes, one a prompt."""
    return [float(mark) for mark in row[key]]
