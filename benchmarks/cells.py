"""What all tables share."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def three(value: float | None) -> str:
    """Three decimals, or that it was not measured."""
    return "not measured" if value is None else f"{value:.3f}"


def bits(row: dict, key: str) -> list[float]:
    """A rate's outcomes, one a prompt."""
    return [float(mark) for mark in row[key]]
