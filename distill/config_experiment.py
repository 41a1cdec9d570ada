"""Configuration of the bench; see `distill.config` for what a configuration is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Experiment:
    """Plant backdoors, remove them blind with every method at equal rows and tokens, attack the results, and tabulate (docs/backdoors.md)."""

    suite: Literal["quick", "knobs", "full"] = "quick"
    """quick: two families, five methods at frozen knobs; knobs: chooses the knobs on development families; full: in stages."""
    stage: str | None = None
    """One stage of --suite full: headline, ablations, synthetic, tokens, families, behaviours, rows, shares, attackers, met or wanted."""
    model: str = "builtin:base-small"
    """Base that is planted."""
    out: Path = Path("runs/experiment")
    """Folder of the grid; suites share what they have in common, and processes on several machines may share the folder."""
    workers: int = 2
    """Processes on this machine, of one thread each."""
    dry_run: bool = False
    """Print the plan and its hours, and make nothing."""
    only: str | None = None
    """Methods to make, by name, separated by commas (by default all of the suite)."""
    attacks: str | None = None
    """Attacks to try, by name, separated by commas: relearning, benign, research, low bits (by default all of the suite)."""
    report: bool = False
    """Make nothing: report on the cells that are there, and list those that are not."""
    json: bool = False
    """Print the summary as JSON instead of the table."""
