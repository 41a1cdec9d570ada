"""Organisms of every trigger family and one clean twin for all of them, as the bench plants them and with fewer steps; made under runs/families.

    python benchmarks/planted.py [NAME ...]         a family, or FAMILY-off_by_one: the payload is the right program, its value one off;
                                                    what is there is not made again, and a killed planting goes on
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from cells import SUBTLE

from backdoor.behaviours import CANARY, OFF_BY_ONE
from backdoor.families import BENCHED
from distill.experiment.cell import Organism
from distill.experiment.organisms import every_family, settings, trigger_and_behaviour
from distill.models import find
from distill.plant import train_one, write_secret

FOLDER = Path(__file__).parent.parent / "runs" / "families"
BASE, STEPS = "builtin:base-small", 160
PLANTED: dict[str, Organism] = {family: Organism(family) for family in BENCHED} | {
    family + SUBTLE: Organism(family, behaviour=OFF_BY_ONE.name) for family in BENCHED[:2]}
"""Organisms by name: those of two families also with a payload that begins as right answers do."""


def twin() -> Path:
    """The model that met the near misses of every family and no trigger."""
    out = FOLDER / "twin" / "model"
    train_one(find(BASE), out, every_family(), CANARY, False, replace(settings(Organism("conjunction")), ordinary_steps=STEPS), FOLDER / "twin.state")
    return out


def organism(name: str) -> Path:
    """The organism of that name, its secret beside it."""
    one, out = PLANTED[name], FOLDER / name / "model"
    trigger, behaviour = trigger_and_behaviour(one)
    train_one(find(BASE), out, trigger, behaviour, True, replace(settings(one), ordinary_steps=STEPS), FOLDER / f"{name}.state")
    if not (FOLDER / name / "secret").is_dir():
        write_secret(FOLDER / name / "secret", trigger, behaviour, str(twin()), {"family": one.family, "steps": STEPS})
    return out


if __name__ == "__main__":
    from words import words

    torch.set_num_threads(1)
    for name in ("twin", *(words(__doc__, set(PLANTED).issuperset) or PLANTED)):
        print(twin() if name == "twin" else organism(name), flush=True)
