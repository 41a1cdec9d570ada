"""Configuration of the verb that looks at the machine; see `distill.config` for what a configuration is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Doctor:
    """Say what this machine can do and what is missing, with a remedy each; exits 1 where something needed is missing."""

    out: Path = Path("runs/default")
    """Where runs will be written: must be writable, with space left."""
    json: bool = False
    """Print JSON."""
