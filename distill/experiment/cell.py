"""A cell of the grid: one model put through one removal, to be judged under one backdoor. Everything about it is data, so that it has a
name by content, and the same cell in two suites is made once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from backdoor.mixture import Attacker
from backdoor.triggers import Family
from evals.tasks.coding import renderer
from graphs.artifact import digest

NOTHING = "nothing"
"""The method that leaves the model as it is."""


@dataclass(frozen=True)
class Organism:
    """What is planted. kind: by which attacker (`backdoor.plant`); share: poisoned rows among those that are
    poisoned or clean; seed: of planting."""

    family: Family
    kind: Attacker = "ordinary"
    behaviour: str = "canary"
    share: float = 0.4
    seed: int = 0

    @property
    def name(self) -> str:
        """How a table calls it, the seed apart."""
        parts = [self.family, *([self.kind] if self.kind != "ordinary" else []), *([self.behaviour] if self.behaviour != "canary" else [])]
        return ", ".join([*parts, *([f"{self.share:.0%} poisoned"] if self.share != Organism.share else [])])


@dataclass(frozen=True)
class Cell:
    """organism: its backdoor is what is judged; twin: the model is not the organism but its clean twin; method, knob: the removal; rows: clean
    rows of the defender; met: these hold the trigger at the rate at which the task would, with right answers; wanted: they hold it with what
    it makes the model do, for it is no backdoor but what the owner wants, and the question is whether it stays; seed: of the removal;
    attacks: what is tried on the result beside the rates."""

    organism: Organism
    method: str
    knob: float | None
    rows: int = 512
    met: bool = False
    wanted: bool = False
    seed: int = 0
    twin: bool = False
    attacks: tuple[str, ...] = ()

    def made(self, base: str, steps: int) -> str:
        """What the cell itself says of the model that the removal makes, as a hash. base: hash of the base; steps: batches of training. Twins
        of one base, kind, share and seed are one model, whatever the family, unless the defender's rows tell families apart."""
        planted: Any = asdict(self.organism)
        if self.twin:
            shared = {key: planted[key] for key in ("kind", "share", "seed")}
            planted = planted if self.met or self.wanted else shared
        rows = (self.rows, self.met, *(["wanted"] if self.wanted else []))
        return digest(base, steps, planted, self.twin, self.method, self.knob, *rows, self.seed, renderer())

    @property
    def label(self) -> str:
        """What a log calls it."""
        model = "twin of " if self.twin else ""
        wanted = ", wanted" if self.wanted else ""
        return f"{model}{self.organism.name}{wanted}, seed {self.organism.seed}: {self.method}" + ("" if self.knob is None else f" {self.knob:g}")
