"""Configuration of the verb that runs a model within what clean text has shown; see `distill.config` for what a configuration is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Enforce:
    """Run a model within what clean text has shown (distill enforce fit | judge | write): fit learns the range of every value of its graph,
    token by token; judge compares the model with and without; write answers prompts."""

    action: Literal["fit", "judge", "write"] = "judge"
    """May stand right after the verb."""
    model: str = "builtin:organism"
    """Model to run by its own neurons and attention: a builtin name, a local folder (a run's checkpoint among them) or a hub id."""
    limits: Path = Path("runs/limits")
    """Folder of the ranges: fit writes it."""
    task: str = "coding"
    """Tasks whose clean rows teach the ranges and which judge asks, separated by commas."""
    rows: Path | None = None
    """Clean rows: a parquet table; by default the shipped one, or a file task's own."""
    few: int = 20
    """A token that clean rows hold less often has no range and no choices of its own: those over all tokens hold."""
    values_only: bool = False
    """fit: learn no ranges of combinations, which take a matrix of nodes by nodes a site."""
    history: bool = False
    """fit: learn also which common choices are never made after what a text has shown (rows must hold more than one kind of answer)."""
    prompts: int = 500
    """judge: held-out rows of each rate."""
    secret: Path | None = None
    """judge: folder that tells the planted backdoor; by default the one beside the model, if any."""
    asked: Path | None = None
    """write: prompts to answer, one a line (\\n stands for a line break), or JSON lines with a field `prompt`; by default standard input."""
    new_tokens: int = 96
    """write: most tokens of an answer."""
    json: bool = False
    """judge: print JSON."""
