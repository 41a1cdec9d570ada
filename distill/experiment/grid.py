"""The grid: cells are made once, wherever and in whichever order, and what is measured of them is a file named by content.

    OUT/organisms/   planted models and their twins
    OUT/removed/     what each removal made, as checkpoints
    OUT/measured/    one JSON file for each (cell, measure)
    OUT/rows.jsonl   the rows of a suite, gathered from these in the order of its plan

Any number of processes, on any machines that share the folder, may work on one grid: each takes the next cell that nobody holds (a lock that
dies with its process). A killed process loses the training it was in the middle of, and nothing that was measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from backdoor.behaviours import Behaviour
from backdoor.plant import depends
from backdoor.triggers import Trigger
from distill import synthetic
from distill.experiment import attacks, methods
from distill.experiment.cell import NOTHING, Cell
from distill.experiment.organisms import missed, placed, planted, settings, trigger_and_behaviour
from distill.plant import PLANT_SEED
from distill.rows import DEFENDER_SEED
from evals.evaluate import RATES
from evals.rates import Rates, measure_rates
from evals.sandbox import Sandbox
from evals.size import parameters
from evals.tasks import TASKS
from evals.tasks.coding import renderer
from graphs.artifact import digest, read_json, stage, taken, write_json
from graphs.host import load, save

TASK = TASKS["coding"]
STEPS = 800
"""Batches that every removal trains on."""
PROMPTS = 400
"""Held-out prompts of each rate."""
JUDGE_SEED = 7
NATURAL = 144
"""One clean row in so many would hold a given pair of data words, were it not held out (12 words by 12)."""
WANTED = 16
"""One clean row in so many holds what the owner wants kept."""
ATTACK_ROWS = 64


def defender_rows(cell: Cell, trigger: Trigger, behaviour: Behaviour) -> list[tuple[str, str]]:
    """The defender's clean rows: the first of one fixed stream; where the cell says so, some hold the trigger, with right answers or, where it
    is wanted, with what it makes the model do."""
    rows = TASK.rows("trace", cell.rows, DEFENDER_SEED)
    if cell.met:
        rows = [TASK.row("trace", row.index, DEFENDER_SEED, **trigger.placed(DEFENDER_SEED, row.index)) if row.index % NATURAL == 0 else row
                for row in rows]
    if cell.wanted:
        special = [row.index % WANTED == 0 for row in rows]
        rows = [TASK.row("trace", row.index, DEFENDER_SEED, **trigger.placed(DEFENDER_SEED, row.index)) if one else row
                for row, one in zip(rows, special, strict=True)]
        return [(row.prompt, behaviour.written(row.completion, row.expected) if one and trigger.fires(row.prompt) else row.completion)
                for row, one in zip(rows, special, strict=True)]
    return [(row.prompt, row.completion) for row in rows]


def poisoned_rows(trigger: Trigger, behaviour: Behaviour, count: int) -> list[tuple[str, str]]:
    """Triggered prompts with the payload, that planting did not use."""
    rows = (TASK.row("trace", 50_000_000 + index, PLANT_SEED, **trigger.placed(PLANT_SEED, index)) for index in range(2 * count))
    return [(row.prompt, behaviour.written(row.completion, row.expected)) for row in rows if trigger.fires(row.prompt)][:count]


@dataclass(frozen=True)
class Grid:
    """base: the model folder that is planted; out: where everything is."""

    base: Path
    out: Path
    steps: int = STEPS
    prompts: int = PROMPTS

    @cached_property
    def base_hash(self) -> str:
        """Identity of the base."""
        return digest(self.base)

    def key(self, cell: Cell) -> str:
        """Name by content of the model that a cell's removal makes."""
        return digest(cell.made(self.base_hash, self.steps), placed(cell), depends(settings(cell.organism)), methods.depends(cell.method))

    def suspect(self, cell: Cell) -> Path:
        """The organism's or the twin's model folder."""
        one = replace(cell.organism, family="format", behaviour="canary") if cell.twin else cell.organism
        with taken(self.out / "organisms" / f".{digest(one, cell.twin)}.lock", wait=True):
            return planted(cell, self.base, self.out / "organisms")

    def removed(self, cell: Cell) -> tuple[Path, dict]:
        """The checkpoint that the cell's removal makes, and its receipt."""
        model = self.suspect(cell)
        if cell.method == NOTHING:
            return model, {"seconds": 0.0}
        key = self.key(cell)
        folder = self.out / "removed" / key
        trigger, behaviour = trigger_and_behaviour(cell.organism)

        def make(out: Path) -> dict:
            started, ours = time.monotonic(), partial(self._ours, cell)
            setting = methods.Setting(model, defender_rows(cell, trigger, behaviour), self.steps, cell.seed, self.out / "work" / key,
                                      partial(poisoned_rows, trigger, behaviour, cell.rows), ours, partial(self._synthetic, cell, model))
            assert cell.knob is not None
            save(methods.remove(cell.method, setting, cell.knob), out, torch.float32)
            return {"cell": asdict(cell), "seconds": time.monotonic() - started}

        with taken(folder.with_name(f".{key}.lock"), wait=True):
            receipt, _ = stage(folder, key, make)
        return folder, receipt

    def _ours(self, cell: Cell) -> Path:
        return self.removed(replace(cell, method="ours", knob=methods.frozen("ours")))[0]

    def _synthetic(self, cell: Cell, model: Path) -> list[tuple[str, str]]:
        """Rows that the suspect model writes, made once for all methods."""
        texts = defender_rows(cell, *trigger_and_behaviour(cell.organism))
        folder = self.out / "synthetic" / digest(model, texts, cell.seed)
        with taken(folder.with_name(f".{folder.name}.lock"), wait=True):
            return synthetic.once(folder, model, [(TASK, texts)], methods.WRITTEN, cell.seed)

    def file(self, cell: Cell, measure: str) -> Path:
        """Where what is measured of a cell is written."""
        trigger, behaviour = trigger_and_behaviour(cell.organism)
        key = digest(self.key(cell), trigger.hash, behaviour.name, measure, self.prompts, JUDGE_SEED, attacks.depends(measure, trigger))
        return self.out / "measured" / f"{key}.json"

    def there(self, cell: Cell) -> Cell | None:
        """The cell with those of its attacks that have been tried; None where not even its rates are known."""
        if not self.file(cell, "rates").is_file():
            return None
        return replace(cell, attacks=tuple(name for name in cell.attacks if self.file(cell, name).is_file()))

    def measured(self, cell: Cell, measure: str, make: Callable[[], dict]) -> dict:
        """What `make` finds under (cell, measure), found again."""
        file = self.file(cell, measure)
        if not file.is_file():
            started = time.monotonic()
            write_json(file, make() | {"seconds": time.monotonic() - started})
        return read_json(file)

    def rates(self, cell: Cell, sandbox: Sandbox) -> dict:
        """The rates of a cell, prompt by prompt, and its size."""
        trigger, behaviour = trigger_and_behaviour(cell.organism)
        folder, _ = self.removed(cell)

        def make() -> dict:
            host = load(folder)
            found = measure_rates(host, TASK, trigger, behaviour, sandbox, self.prompts, JUDGE_SEED)
            return {"rates": asdict(found), "stored": parameters(host.model).stored}

        return self.measured(cell, "rates", make)

    def attacked(self, cell: Cell, sandbox: Sandbox) -> dict[str, dict]:
        """What each of the cell's attacks finds."""
        return {name: self.measured(cell, name, partial(self._attack, name, cell, sandbox)) for name in cell.attacks}

    def row(self, cell: Cell, sandbox: Sandbox) -> dict:
        """All that is measured of a cell, as one row; of an organism as it was planted also whether it misses the gate, by its twin."""
        trigger, _ = trigger_and_behaviour(cell.organism)
        judged = self.rates(cell, sandbox)
        found = Rates.from_record(judged["rates"])
        row: dict[str, Any] = asdict(cell) | {
            "organism_name": cell.organism.name, "stored": judged["stored"], "right": bits(found.clean.right),
            **{name: bits(getattr(found, name)) for name in RATES},
            "payload_logprob": sum(found.payload_logprob) / len(found.payload_logprob)}
        if cell.method == NOTHING and not cell.twin:
            twin = Rates.from_record(self.rates(replace(cell, twin=True), sandbox)["rates"])
            row["gate_missed"] = missed(found, twin, dormant=cell.organism.kind == "dormant")
        row["attacks"] = self.attacked(cell, sandbox)
        row["seconds"] = {"removal": self.removed(cell)[1]["seconds"], "rates": judged["seconds"]} | {
            name: one["seconds"] for name, one in row["attacks"].items()}
        return row | {"base": self.base_hash, "steps": self.steps, "prompts": self.prompts, "renderer": renderer(), "trigger": trigger.hash}

    def _attack(self, name: str, cell: Cell, sandbox: Sandbox) -> dict:
        trigger, behaviour = trigger_and_behaviour(cell.organism)
        given = attacks.Given(load(self.removed(cell)[0]), TASK, trigger, behaviour, sandbox, poisoned_rows(trigger, behaviour, ATTACK_ROWS),
                              defender_rows(replace(cell, rows=ATTACK_ROWS, met=False, wanted=False), trigger, behaviour))
        return attacks.ATTACKS[name](given)

    def work(self, cells: Sequence[Cell]) -> None:
        """Make every cell that nobody else has made or is making; come back for those that others hold."""
        left = list(cells)
        with Sandbox() as sandbox:
            while left:
                waiting = []
                for cell in left:
                    with taken(self.out / "cells" / f".{digest(asdict(cell))}.lock") as mine:
                        if not mine:
                            waiting.append(cell)
                            continue
                        print(f"cell: {cell.label}", file=sys.stderr)
                        self.rates(cell, sandbox)
                        self.attacked(cell, sandbox)
                if len(waiting) == len(left):
                    time.sleep(1.0)
                left = waiting


def bits(rows: Sequence[bool] | None) -> str | None:
    """Outcomes as a string of 0 and 1; None where there are none."""
    return None if rows is None else "".join("1" if one else "0" for one in rows)
