"""Ours by basis and by score against what one would do without a graph, at three sizes, at equal rows and training tokens.

    python benchmarks/budgets.py SEED ...         makes and judges every cell of these seeds, writes results/budgets/seed-N.jsonl
    python benchmarks/results.py readme           prints the table of what is there

The default organism, three shares of its stored parameters (embeddings apart), every method trained on the same rows for as many batches
as the default command takes. A cell is written when it is done, so a killed run resumes; seeds may run side by side. Each cell keeps
the outcome of every prompt, so that methods are compared prompt by prompt.

    ours                       transcoders, gates warm-started by Fisher scores: `distill prune --target-ratio R`
    ours, SCORE alone          the same, nodes ranked by a score, and healed for the batches that gates would have taken
    ours, random nodes         the control: a random graph of equal size
    ours, own parts            nothing fitted: gates over the model's own neurons and attention: `--basis neurons --attention kept`
    ours, neurons              the model's own neurons instead of transcoders: `--basis neurons`
    ours, heads and layers     whole layers instead of neurons: `--basis layers`
    magnitude, Wanda,          the model's own neurons and attention, dropped by a score, then healed for all the batches
    random mask
    layer drop                 whole layers dropped, the most that fit, then healed for all the batches
    dense refit                our shapes and losses, from noise, without graph or gates
    written text               our shapes, from scratch, on answers that the model wrote to the rows' prompts
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from backdoor.removal import dense_refit, layer_drop, written_text
from distill import config
from distill.job import prepare
from distill.models import CLEAN_ROWS, find, read_secret, secret_beside
from distill.rivals import PRUNED, fitting_layers, random_student, written
from distill.rows import batches, read
from distill.search import HEAL_RATE
from distill.source import commit
from distill.stages import road
from evals.evaluate import Backdoor, EvaluateConfig, judge_models
from evals.size import parameters
from evals.tasks import TASKS, named
from graphs.artifact import digest, write_text
from graphs.batches import Epochs
from graphs.host import Host, load, save
from graphs.targets import Targets

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "budgets"
WORK = ROOT / "runs" / "budgets"
BUDGETS = (0.5, 0.25, 0.125)
MODEL, TASK = "builtin:organism", "coding"
BASE = config.Prune(model=MODEL, task=TASK, tune_rows=1, heal_answers=0.0)
"""The model alone is followed, by every method that follows it."""
STEPS = 1580
"""Batches of every method."""
SHAPES = "ours"
"""The method whose checkpoint gives the dense refit and the student on written text their shapes."""
OURS: dict[str, dict] = {
    SHAPES: {},
    "ours, own parts": {"basis": "neurons", "attention": "kept", "target": "own", "fit_steps": 0, "joint_steps": 0},
    "ours, neurons": {"basis": "neurons", "target": "own"},
    "ours, heads and layers": {"basis": "layers", "target": "own"},
    **{f"ours, {name}": {"score": score, "gate_steps": 0} for name, score in (
        ("integrated gradients alone", "integrated"), ("Fisher alone", "fisher"), ("RelP alone", "relp"), ("random nodes", "random"))},
    **{name: PRUNED | {"score": score} for name, score in (("magnitude", "magnitude"), ("Wanda", "activation"), ("random mask", "random"))},
}
FIRST = (SHAPES, "ours, own parts", "magnitude", "Wanda", "written text", "layer drop", "random mask", "ours, neurons", "dense refit")
"""The order in which cells are made: what the comparison turns on comes first."""
LEARNING_RATE = 2e-3
"""Of written text: the better of two at the default size (README)."""


def settings(name: str, budget: float, seed: int, data: Epochs) -> config.Prune:
    """A cell of our road, healed with what the other stages leave of `STEPS`; cells that share a graph share a folder, which finds it again."""
    changed = replace(BASE, **OURS[name] | {"target_ratio": budget, "seed": seed})
    before = changed.fitting + changed.gate_steps
    folder = WORK / f"seed-{seed}" / f"{changed.basis}-{changed.attention}"
    return replace(changed, heal_tokens=data.tokens(STEPS) - data.tokens(before), out=folder)


class Bench:
    """What all cells of a seed share."""

    def __init__(self, seed: int) -> None:
        self.seed, self.model = seed, find(MODEL)
        self.host, self.texts = load(self.model), read(CLEAN_ROWS, named(TASK))
        self.data, self.rows = batches(self.host, self.texts, BASE.batch, seed)
        self.targets = Targets(self.host, self.data)
        secret = secret_beside(self.model)
        assert secret is not None
        self.secret = read_secret(secret)
        self.whole = parameters(self.host.model).stored

    def shapes(self, budget: float) -> Path:
        """Where our checkpoint at this size is kept."""
        return WORK / f"seed-{self.seed}" / f"shapes-{budget:g}"

    def student(self, budget: float) -> Host:
        """A model of our shapes at this size with fresh block weights; where our checkpoint is gone, it is made again, without healing: that
        moves no shape."""
        if not self.shapes(budget).is_dir():
            self.ours(SHAPES, budget, heal_tokens=0)
        return random_student(self.shapes(budget), self.host, self.seed)

    def ours(self, name: str, budget: float, **changes) -> Host:
        """Our road to this size, with a method's settings."""
        verb = replace(settings(name, budget, self.seed, self.data), **changes)
        road(prepare(self.model, self.texts, named(TASK), verb), self.model, verb, [])
        if name == SHAPES:
            shutil.rmtree(self.shapes(budget), ignore_errors=True)
            shutil.copytree(verb.out / "checkpoint", self.shapes(budget))
        return load(verb.out / "checkpoint")

    def dropped_layers(self, budget: float) -> Host:
        """The most layers that fit. Raises ValueError where not even one does."""
        layers = fitting_layers(self.host, budget * self.whole)
        if not layers:
            raise ValueError("one layer takes more")
        return layer_drop.remove(self.targets, layers, STEPS, HEAL_RATE, BASE.heal_decay)

    def refitted(self, budget: float) -> Host:
        """Our shapes and losses, from noise."""
        return dense_refit.remove(self.targets, self.student(budget), BASE.fit_steps, STEPS, dense_refit.KNOBS[0], HEAL_RATE, BASE.heal_decay)

    @cache  # noqa: B019  # one bench lives as long as its process
    def written(self) -> Callable:
        """Batches of what the model answers to the rows' prompts."""
        return batches(self.host, written(self.host, self.texts, named(TASK), self.seed), BASE.batch, self.seed)[0]

    def taught(self, budget: float) -> Host:
        """Our shapes, trained from scratch on what the model wrote."""
        return written_text.remove(self.student(budget), self.written(), STEPS, LEARNING_RATE)

    def way(self, name: str) -> Callable[[float], Host]:
        """How a method makes its cell."""
        return partial(self.ours, name) if name in OURS else partial(OTHERS[name], self)

    def judge(self, folder: Path) -> dict:
        """Every prompt's outcome, as a string of 0 and 1, and the size."""
        backdoor = Backdoor(TASKS[TASK], self.secret.trigger, self.secret.behaviour)
        asked = EvaluateConfig(prompts=BASE.prompts, sampled=False, speed_repeats=1)
        judged = judge_models({"cell": folder}, "cell", named(TASK), [], backdoor, asked)
        rows = judged["rows"]["cell"]
        found = {"right": rows["tasks"][TASK]["right"]} | {key: rows["backdoor"][key] for key in ("right_under_trigger", "attack_success")}
        return {"stored": judged["models"]["cell"]["size"]["stored"]} | {key: "".join(str(int(v)) for v in value) for key, value in found.items()}


OTHERS: dict[str, Callable[[Bench, float], Host]] = {"layer drop": Bench.dropped_layers, "dense refit": Bench.refitted, "written text": Bench.taught}
"""Methods that have no road."""


class Rows:
    """The rows of one seed: those on disk that were made of the same inputs, and what is added."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.file = bench, RESULTS / f"seed-{bench.seed}.jsonl"
        self.facts = {"seed": bench.seed, "steps": STEPS, "tokens": bench.data.tokens(STEPS), "rows": len(bench.rows), "whole": bench.whole,
                      "inputs": digest(bench.model, bench.texts, STEPS, BASE.prompts)}
        there = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []
        self.rows = [row for row in there if all(row.get(key) == value for key, value in self.facts.items())]

    def has(self, method: str, budget: float) -> bool:
        """Whether the cell is done."""
        return any((row["method"], row["budget"]) == (method, budget) for row in self.rows)

    def add(self, row: dict) -> None:
        """Write one more."""
        self.rows.append(row | self.facts | {"commit": commit()})
        write_text(self.file, "".join(json.dumps(one) + "\n" for one in self.rows))

    def make(self, name: str, budget: float) -> None:
        """Make and judge a cell that is not there yet."""
        if self.has(name, budget):
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                save(self.bench.way(name)(budget), Path(folder) / "cell", torch.float32)
            except ValueError as error:  # no member of this family is as small
                self.add({"method": name, "budget": budget, "refused": str(error)})
                return
            self.add({"method": name, "budget": budget} | self.bench.judge(Path(folder) / "cell"))
        print(f"seed {self.bench.seed}: {name} at {budget:g} done", file=sys.stderr)


def run(seeds: list[int]) -> None:
    """Make what is missing, method by method and within a method seed by seed: what stops early has fewer methods, not fewer seeds."""
    found = [Rows(Bench(seed)) for seed in seeds]
    for rows in found:
        if not rows.has("twin", 1.0):
            assert rows.bench.secret.twin is not None
            rows.add({"method": "twin", "budget": 1.0} | rows.bench.judge(rows.bench.secret.twin))
    for name in (*FIRST, *(name for name in (*OURS, *OTHERS) if name not in FIRST)):
        for rows in found:
            for budget in BUDGETS:
                rows.make(name, budget)


if __name__ == "__main__":
    from words import numbers, words

    seeds = words(__doc__, numbers)
    RESULTS.mkdir(parents=True, exist_ok=True)
    run([int(word) for word in seeds])
