"""Configurations of the verbs that test what is claimed of a run; see `distill.config` for what a configuration is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.config import Flow


@dataclass(frozen=True)
class Listing(Flow):
    """Print a run's circuit as a program, each value defined before its uses; --code writes it as a Python file that runs by itself."""

    parents: int = 4
    """Parents that each line names."""
    code: bool = False
    """Write RUN/listing/circuit.py: hypotheses as functions where distill understand accepted some, equations elsewhere; and run it."""
    samples: int = 4
    """Rows of each task's test split that the file checks itself on (--code)."""


@dataclass(frozen=True)
class Understand:
    """How much of a run is explained by hypotheses, proven by substitution; proposes and tests them first where there are none."""

    run: Path = Path("runs/default")
    """Run folder; may stand right after the verb."""
    part: Literal["circuit", "graph"] = "circuit"
    """The circuit that was kept and healed, or the fitted graph inside the model."""
    rows: int = 512
    """Clean rows that hypotheses are made from."""
    judged: int = 64
    """Rows of each task's tune split that each is accepted or rejected on."""
    tested: int = 48
    """Nodes whose hypotheses are tested, those that matter most first (heads are all tested)."""
    prompts: int = 32
    """Rows of each task's test split that the shares are measured on."""
    holes: bool = False
    """Also rank where the unexplained sits: site or head, length of context, kind of text, examples."""
    contexts: bool = False
    """Also measure the shares in longer contexts: each row behind whole rows of its own task (few-shot) or of others (distractor), up to 256
    and 512 tokens. Takes many times as long."""
    seed: int = 0
    """Seed of everything random."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Gate:
    """Exit 1 unless what distill understand measured is enough: scale no further until this is understood."""

    run: Path = Path("runs/default")
    """Run folder; may stand right after the verb."""
    min_understood: float = 0.9
    """Least share of code and equations together (the lower end of its interval)."""
    max_error: float = 0.02
    """Largest share of errors (the upper end of its interval)."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Test:
    """A run's accepted hypotheses as regression tests of another checkpoint of its shape, on held-out and shifted prompts."""

    on: Path
    """Checkpoint folder: the run's checkpoint/, or what became of it."""
    run: Path = Path("runs/default")
    """Run folder; may stand right after the verb."""
    prompts: int = 32
    """Rows of each task's test split; as many are shifted (each after another whole row)."""
    drop: float = 0.1
    """How much less of its target's effect a hypothesis may recover than in the run's own circuit."""
    seed: int = 0
    """Seed of everything random."""
    json: bool = False
    """Print JSON."""
