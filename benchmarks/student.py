"""How long a model trained from scratch on text that the model wrote takes to reach ours.

    python benchmarks/student.py 0.25     after benchmarks/budgets.py 0 has made ours at this share; writes results/student.json

A fresh model of our checkpoint's shapes at that share of the parameters, trained on answers that the default organism wrote (one to each of
40,000 prompts of the trace split, temperature 1), for up to three times the tokens that the base itself was trained on. One trunk at a
constant rate; at each point a branch of a tenth of the steps so far brings the rate down to nothing and is judged (warmup, stable, decay:
Hu et al. 2024, "MiniCPM"). The prompts are many more than the rows our road saw: this favours the student. A killed run resumes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from budgets import BASE, LEARNING_RATE, RESULTS, TASK, WORK, Bench

from distill.rivals import random_student
from distill.rows import batches
from evals.generate import complete
from evals.tasks import TASKS
from graphs.artifact import read_json, write_json
from graphs.batches import Epochs
from graphs.host import save
from graphs.train import TrainConfig, train

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "student.json"
PROMPTS = 40_000
BASE_TOKENS = 20_000_000
"""Tokens that the builtin base was trained on (distill/base.py: 5,000 batches of 64 rows)."""
POINTS = (2_500_000, 5_000_000, 10_000_000, 20_000_000, 40_000_000, 3 * BASE_TOKENS)
BRANCH = 0.1


def written(bench: Bench) -> Epochs:
    """Batches of what the organism answers, written once and kept in the work folder."""
    file = WORK / "written.json"
    if not file.is_file():
        prompts = [row.prompt for row in TASKS[TASK].rows("trace", PROMPTS, seed=11)]
        write_json(file, list(zip(prompts, complete(bench.host, prompts, TASKS[TASK].max_new_tokens, 1.0, 0), strict=True)))
    return batches(bench.host, [tuple(pair) for pair in read_json(file)], BASE.batch, 0)[0]


def main(budget: float) -> None:
    """Train, branch, judge."""
    bench, state = Bench(0), WORK / f"student-{budget:g}"
    data, student = written(bench), random_student(bench.shapes(budget), bench.host, 0)
    per_step = data.tokens(200) / 200
    found = read_json(OUT) if OUT.is_file() else {}
    points = found.setdefault(f"{budget:g}", [])

    def loss(step: int) -> torch.Tensor:
        batch = data(step)
        return student.model(input_ids=batch.ids, labels=batch.labels).loss

    def branch(trunk: int, steps: int) -> dict:
        copy = state.with_name(state.name + "-branch")
        shutil.copy(state, copy)
        falling = TrainConfig(steps, LEARNING_RATE, warmup=0.01, decay=1 - trunk / steps, weight_decay=0.1)
        train(student.model, loss, falling, f"branch at {trunk}", copy)
        copy.unlink()
        student.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            save(student, Path(folder) / "model", torch.float32)
            return bench.judge(Path(folder) / "model")

    for tokens in POINTS[len(points):]:
        steps = round(tokens / per_step)
        trunk = round(steps * (1 - BRANCH))
        train(student.model, loss, TrainConfig(trunk, LEARNING_RATE, warmup=0.01, decay=0.0, weight_decay=0.1), f"trunk to {tokens:,}", state, 500)
        judged = branch(trunk, steps)
        rates = {key: sum(map(int, judged[key])) / len(judged[key]) for key in ("right", "right_under_trigger", "attack_success")}
        points.append({"tokens": round(steps * per_step), "stored": judged["stored"]} | rates)
        write_json(OUT, found)
        print(json.dumps(points[-1]), file=sys.stderr)


if __name__ == "__main__":
    from words import words

    (share,) = words(__doc__, lambda given: len(given) == 1 and (RESULTS / "seed-0.jsonl").is_file())
    main(float(share))
