"""Organisms of every trigger family and one clean twin for all of them, as the bench plants them and with fewer steps; made under runs/families.

    python benchmarks/planted.py [FAMILY ...]       what is there is not made again, and a killed planting goes on
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from backdoor.behaviours import CANARY
from backdoor.families import BENCHED
from distill.experiment.cell import Organism
from distill.experiment.organisms import every_family, settings, trigger_and_behaviour
from distill.models import find
from distill.plant import train_one, write_secret

FOLDER = Path(__file__).parent.parent / "runs" / "families"
BASE, STEPS = "builtin:base-small", 160
FAMILIES = BENCHED


def twin() -> Path:
    """The model that met the near misses of every family and no trigger."""
    out = FOLDER / "twin" / "model"
    train_one(find(BASE), out, every_family(), CANARY, False, replace(settings(Organism("conjunction")), ordinary_steps=STEPS), FOLDER / "twin.state")
    return out


def organism(family: str) -> Path:
    """The organism of one family, its secret beside it."""
    one, out = Organism(family), FOLDER / family / "model"  # type: ignore[arg-type]
    trigger, behaviour = trigger_and_behaviour(one)
    train_one(find(BASE), out, trigger, behaviour, True, replace(settings(one), ordinary_steps=STEPS), FOLDER / f"{family}.state")
    if not (FOLDER / family / "secret").is_dir():
        write_secret(FOLDER / family / "secret", trigger, behaviour, str(twin()), {"family": family, "steps": STEPS})
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("twin", *(sys.argv[1:] or FAMILIES)):
        print(twin() if name == "twin" else organism(name), flush=True)
