"""From holes to a better fit: what `--mend-steps` does to the largest hole, beside a fit that is as much longer everywhere.

    python benchmarks/holes.py SEED ...          fits the default organism's graph three ways a seed, writes results/holes.json

    as it is     `distill fit`
    mended       `distill fit --mend-steps 100`
    longer       `distill fit --joint-steps 200`: the control, as many batches more for all parts at once

All are measured on prompts of the test split: the hole of every site (KL to the model when this part alone stands in for its layer, nats a
completion token), FVU, L0, and KL with all parts swapped in. A row that is in the file already is not made again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from distill import config
from distill.job import prepare
from distill.models import CLEAN_ROWS, find
from distill.rows import DEFENDER_SEED, read
from distill.source import commit
from distill.stages import graph_stage
from evals.tasks import TASKS, named
from graphs.artifact import write_text
from graphs.batches import Epochs, encode
from graphs.fit import quality
from graphs.host import Host
from graphs.mend import holes
from graphs.replace import Replacement
from graphs.targets import Targets

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "holes.json"
STEPS, PROMPTS = 100, 400
TASK = "coding"
WAYS = {"as it is": {}, "mended": {"mend_steps": STEPS}, "longer": {"joint_steps": config.Fit.joint_steps + STEPS}}


def held_out(host: Host) -> Targets:
    """Prompts of the test split."""
    rows = TASKS[TASK].rows("test", PROMPTS, seed=DEFENDER_SEED)
    return Targets(host, Epochs(encode(host.tokenizer, [(row.prompt, row.completion) for row in rows]), 40, host.tokenizer.eos_token_id, 0))


def measured(seed: int, way: str) -> dict:
    """Fit, and measure."""
    model = find(config.Fit.model)
    verb = replace(config.Fit(task=TASK, seed=seed, out=ROOT / "runs" / "holes" / f"{way.replace(' ', '-')}-{seed}"), **WAYS[way])
    job = prepare(model, read(CLEAN_ROWS, named(TASK)), named(TASK), verb)
    receipt = graph_stage(job, model)
    fitted, held = Replacement.load(job.folder / "graph", job.host), held_out(job.host)
    batches = held.batches.per_epoch
    found = quality(job.host, fitted, held.batches, batches)
    return {"seed": seed, "way": way, "mended": next((name for name in receipt["losses"] if name.startswith("mend ")), None),
            "holes": holes(held, fitted, batches), "fvu": {site["name"]: site["fvu"] for site in found["sites"]},
            "l0": {site["name"]: site["l0"] for site in found["sites"] if site["l0"] is not None}, "kl_swapped": found["kl_swapped"],
            "steps": STEPS, "prompts": PROMPTS, "commit": commit()}


def main(seeds: list[int]) -> None:
    """Make what is missing."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for seed in seeds:
        for way in WAYS:
            if not any((row["seed"], row["way"]) == (seed, way) for row in rows):
                rows.append(measured(seed, way))
                write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
                print(rows[-1], file=sys.stderr)


if __name__ == "__main__":
    from words import numbers, words

    main([int(word) for word in words(__doc__, numbers)])
