"""`distill experiment`: make a suite's cells, gather its rows, and print the table.

    plan the cells -> workers make and measure them -> rows.jsonl -> table.md, report.html (and knobs.json)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from distill.config_experiment import Experiment
from distill.experiment import methods, suites
from distill.experiment.attacks import ATTACKS
from distill.experiment.cell import NOTHING, Cell
from distill.experiment.grid import Grid
from distill.experiment.page import write_page
from distill.experiment.summary import chosen, lines, missing, ungated, worst
from distill.experiment.tables import markdown
from distill.models import find
from evals.sandbox import Sandbox
from graphs.artifact import write_json, write_text

WORKER = "DISTILL_EXPERIMENT_WORKER"
"""Set in the processes that make cells beside the first."""


def run(verb: Experiment) -> int:
    """Make what is missing and report."""
    if verb.stage is not None and verb.suite != "full":
        raise ValueError(f"--stage {verb.stage} belongs to another suite; give --suite full")
    cells = _plan(verb)
    missing_knobs = [] if verb.suite == "knobs" else methods.unfrozen(cell.method for cell in cells if cell.method != NOTHING)
    if verb.dry_run:
        print("\n".join([plan(cells, verb.workers), *(f"no knob is frozen yet for {name}" for name in missing_knobs)]))
        return 0
    if missing_knobs and not verb.report:
        raise ValueError(f"no knob is frozen for {', '.join(missing_knobs)}: run distill experiment --suite knobs and copy its knobs.json to "
                         f"{methods.KNOBS_FILE}, or name others with --only")
    grid = Grid(find(verb.model), verb.out)
    if not verb.report:
        _make(verb, grid, cells)
    if WORKER in os.environ:
        return 0
    with Sandbox() as sandbox:
        rows = [grid.row(there, sandbox) for cell in cells if (there := grid.there(cell))]
    if not rows:
        raise ValueError(f"--report: {verb.out} holds no cell of this suite; run it without --report first")
    write_text(verb.out / f"{verb.suite}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return report(verb, cells, rows)


def report(verb: Experiment, cells: Sequence[Cell], rows: Sequence[dict]) -> int:
    """Write and print what the rows say."""
    if verb.suite == "knobs":
        found = {"chosen_on": sorted({row["organism_name"] for row in rows}), "rows": rows[-1]["rows"], "steps": rows[-1]["steps"],
                 "methods": chosen(rows)}
        write_json(verb.out / "knobs.json", found)
        print(f"knobs in {verb.out / 'knobs.json'}; to freeze them, copy it to {methods.KNOBS_FILE}", file=sys.stderr)
    found_lines, absent, missed = lines(rows), missing(cells, rows), ungated(rows)
    text = markdown(found_lines, worst(found_lines), absent, missed, rows)
    write_text(verb.out / f"{verb.suite}.md", text)
    write_page(verb.out / f"{verb.suite}.html", verb, found_lines, worst(found_lines), absent, missed, rows)
    print(json.dumps([asdict(line) for line in found_lines], indent=1) if verb.json else text)
    return 0


def _plan(verb: Experiment) -> list[Cell]:
    """The suite's cells, or those that --only and --attacks leave of them."""
    cells = suites.cells(verb.suite, verb.stage)
    if verb.only is not None:
        wanted = _named("--only", verb.only, (*methods.names(), *methods.WITH_SYNTHETIC, *methods.WITH_SEEN), "method")
        cells = [cell for cell in cells if cell.method in (NOTHING, *wanted)]
    if verb.attacks is not None:
        tried = _named("--attacks", verb.attacks, tuple(ATTACKS), "attack")
        cells = [replace(cell, attacks=tuple(name for name in cell.attacks if name in tried)) for cell in cells]
    return cells


def _named(flag: str, words: str, known: Sequence[str], kind: str) -> list[str]:
    """The names in a comma-separated list; a name may hold commas itself, and the longest that fits is meant."""
    left, wanted = [word.strip() for word in words.split(",") if word.strip()], []
    while left:
        size = next((count for count in range(len(left), 0, -1) if ", ".join(left[:count]) in known), None)
        if size is None:
            raise ValueError(f"{flag} {left[0]}: no such {kind}; choose from {', '.join(known)}")
        wanted.append(", ".join(left[:size]))
        left = left[size:]
    return wanted


def _make(verb: Experiment, grid: Grid, cells: Sequence[Cell]) -> None:
    """Work on the cells, beside as many more processes as were asked for. Raises ValueError where one of them failed."""
    import torch

    torch.set_num_threads(1)
    asked = {"--suite": verb.suite, "--stage": verb.stage, "--model": verb.model, "--out": verb.out, "--only": verb.only,
             "--attacks": verb.attacks, "--workers": 1}
    flags = [str(word) for flag, value in asked.items() if value is not None for word in (flag, value)]
    command = [sys.executable, "-m", "distill", "experiment", *flags]
    environment = os.environ | {WORKER: "1", "OMP_NUM_THREADS": "1"}
    others = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(verb.workers - 1)]
    try:
        grid.work(cells)
    except BaseException:
        for other in others:
            other.terminate()
        raise
    if any([other.wait() for other in others]):
        raise ValueError("a worker failed (its error stands above): start the same command again to go on")


def plan(cells: Sequence[Cell], workers: int) -> str:
    """What would be made, and the hours it took where it was measured (the seconds that knobs.json holds, one process)."""
    known, total, unknown, out = methods.knobs(), 0.0, set(), []
    for name, count in Counter(cell.method for cell in cells).items():
        seconds = known.get(methods.tuned(name), {}).get("seconds")
        if seconds is None and name != NOTHING:
            unknown.add(name)
        total += (seconds or 0.0) * count
        out.append(f"{count:5} x {name:28}" + ("" if seconds is None else f"{seconds * count / 3600:6.1f} h of removal"))
    organisms = {cell.organism for cell in cells}
    gaps = f" (not measured: {', '.join(sorted(unknown))})" if unknown else ""
    return "\n".join([f"{len(cells)} cells, {len(organisms)} organisms", *out,
                      f"removal in all, {workers} processes: {total / 3600 / workers:.1f} h{gaps}"])
