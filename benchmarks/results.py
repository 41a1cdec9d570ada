"""Every figure in the README and in docs/results.md: run the commands, keep their summaries, print them into these pages.

    python benchmarks/results.py run      runs each command below, writes results/summaries.jsonl (one row a command)
    python benchmarks/results.py keep NAME FOLDER   takes the row from a finished run of that command (make demo is `default`);
                                                    a third word, `beside`, says that other work ran then: no time is shown
    python benchmarks/results.py rivals FOLDER      makes and judges the rivals of a finished run, writes distill/assets/rivals.jsonl
    python benchmarks/results.py experiment SUITE FOLDER [STAGE]   keeps the rows of distill experiment --suite SUITE [--stage STAGE] --out FOLDER
    python benchmarks/results.py readme   writes both pages' tables from those files; the tests check that they are current

A row holds the command, the flat summary that the run wrote, the gates, the commit and the versions; nothing is typed by hand.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

from cells import ROOT
from pages import PAGES, RIVALS, ROWS, page, rows

RUNS = {
    "default": ["--task", "coding"],
    "rare": ["--task", "coding", "--model", "builtin:organism-rare"],
    "all": ["--task", "coding,math,stories"],
    "twin": ["--task", "coding", "--model", "builtin:twin"],
    "neurons": ["--task", "coding", "--basis", "neurons"],
    "components": ["--task", "coding", "--attention-nodes", "components"],
}


def keep_experiment(suite: str, folder: Path, stage: str | None = None) -> None:
    """Commit a suite's rows, or a stage's, compressed; the same rows give the same bytes."""
    out = ROOT / "results" / "experiment" / f"{stage or suite}.jsonl.gz"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(gzip.compress((folder / f"{suite}.jsonl").read_bytes(), 9, mtime=0))


def keep(name: str, folder: Path, alone: bool = True) -> None:
    """Put the finished run in `folder` into the row `name`; the other rows stay."""
    made = json.loads((folder / "report.json").read_text())
    found = {row["name"]: row for row in rows()} if ROWS.is_file() else {}
    command = " ".join(["python -m distill prune", *RUNS[name]])
    passed = all(gate["passed"] is not False for gate in made["gates"])
    facts = {key: made[key] for key in ("summary", "gates", "stages", "commit", "versions")}
    timed = alone and not any(stage["cached"] for stage in made["stages"])
    found[name] = {"name": name, "command": command, "gates_passed": passed, "timed": timed} | facts
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps(found[key]) + "\n" for key in RUNS if key in found))


def run(names: list[str]) -> None:
    """Run the named commands (all by default) and keep their rows."""
    for name in names or list(RUNS):
        out = ROOT / "runs" / f"results-{name}"
        subprocess.run([sys.executable, "-m", "distill", "prune", *RUNS[name], "--out", str(out)], cwd=ROOT)
        keep(name, out)


if __name__ == "__main__":
    from words import refuse, words

    match words(__doc__):
        case ["run", *names]:
            run(names)
        case ["keep", name, folder, *beside]:
            keep(name, Path(folder), not beside)
        case ["rivals", folder]:
            command = [sys.executable, "-m", "distill", "evaluate", "--run", folder, "--rivals", "--out", str(RIVALS)]
            sys.exit(subprocess.run(command, cwd=ROOT).returncode)
        case ["experiment", suite, folder, *stage]:
            keep_experiment(suite, Path(folder), *stage)
        case ["readme"]:
            for file in PAGES:
                file.write_text(page(file))
        case _:
            refuse(__doc__)
