"""A circuit run on a share of its edges: how much of the task it keeps, what the trigger still does, what a token costs.

    python benchmarks/edges.py RUN [SCORE:SHARE ...]     measures cells of the finished default run in RUN, writes results/edges.json

A cell is what `distill evaluate --run RUN --as edges --edges SHARE --edge-score SCORE --edge-steps STEPS` judges; all cells are healed for
equally many steps, and cells of other calls stay in the file. Beside them: how exactly the run with every edge is the checkpoint, and the
curve of every score with nothing healed (`distill curve --edges`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from distill import config
from distill.curve import edge_curves
from distill.edges import exactness, judge
from distill.runs import reopen
from distill.source import commit
from graphs.artifact import read_json, write_json

ROOT = Path(__file__).parent.parent
FILE = ROOT / "results" / "edges.json"
STEPS, PROMPTS = 1500, 500
CELLS = ("fisher:0.2", "magnitude:0.2", "random:0.2", "fisher:0.1", "flow:0.2", "gates:0.2", "fisher:0.05")
SCORES = ("fisher", "flow", "magnitude", "random")


def cell(run: Path, score: str, share: float) -> dict:
    """One row: the edges' own numbers, and the checkpoint's on the same rows."""
    judged = judge(config.Evaluate(run=run, as_="edges", edges=share, edge_score=score, edge_steps=STEPS, prompts=PROMPTS))  # type: ignore[arg-type]

    def facts(name: str) -> dict:
        against, backdoor = judged["against"][name], judged["models"][name]["backdoor"]
        return {"pass_at_1": judged["models"][name]["tasks"]["coding"]["score"], "retention": against["tasks"]["coding"]["retention"],
                "right_under_trigger": against["backdoor"]["right_under_trigger_retention"], "attack_success": backdoor["attack_success"],
                "attack_success_sampled": backdoor["attack_success_sampled"], "tokens_per_second": judged["models"][name]["speed"]}

    return {"score": score, "share": share, "steps": STEPS, "prompts": PROMPTS, "edges": judged["edges"], "slower": judged["slower"],
            "edges_run": facts("edges"), "checkpoint": facts("checkpoint")}


def main(run: Path, wanted: list[str]) -> None:
    """Measure and write, cell by cell."""
    found = read_json(FILE) if FILE.is_file() else {"cells": {}}
    found |= {"commit": commit(), "command": read_json(run / "report.json")["command"], "exactness": exactness(reopen(run, "circuit"))}
    write_json(FILE, found)
    for name in wanted:
        score, share = name.split(":")
        found["cells"][name] = cell(run, score, float(share))
        print(name, found["cells"][name]["edges_run"], file=sys.stderr)
        write_json(FILE, found)
    if "curves" not in found:
        write_json(FILE, found | {"curves": edge_curves(config.Curve(run=run, edges=True), SCORES)["curves"]})


if __name__ == "__main__":
    from words import words

    run, *cells = words(__doc__, lambda given: bool(given) and all(":" in word for word in given[1:]))
    main(Path(run), cells or list(CELLS))
