"""How test code grades: the published solutions of benchmarks, those of other tasks as wrong ones, and 1,000 completions by the clock.

    python benchmarks/grading.py humaneval:HumanEval.jsonl.gz mbpp:mbpp.jsonl.gz

writes results/grading.json. A published solution that does not pass is named with the reason; most are errors of the data set. The 1,000
completions are the first file's solutions, right and wrong by turns. Their cost is given in processor seconds too, jails and all: the
clock alone says little where other work runs beside (`load` is the load average at the start).
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

from evals.capability import grade, job
from evals.sandbox import Sandbox, describe
from evals.tasks import SPLITS, Row
from evals.tasks.files import opened
from graphs.artifact import write_json

OUT = Path(__file__).parent.parent / "results" / "grading.json"
COMPLETIONS = 1000


def rows_of(name: str) -> list[Row]:
    """All rows of a task's file, in every split."""
    kind, _, where = name.partition(":")
    task = opened(kind, where)
    return [row for split in SPLITS for row in task.splits[split]]


def solutions(rows: list[Row], sandbox: Sandbox) -> dict:
    """How many published solutions pass, how many do in another's place, and why some do not pass."""
    verdicts = sandbox.grade([job(row, row.completion) for row in rows])
    failing = [{"entry": row.names[0], "status": verdict.status, "why": verdict.detail} for row, verdict in zip(rows, verdicts, strict=True)
               if not verdict.passed]
    swapped = grade(rows, [row.completion for row in rows[1:] + rows[:1]], sandbox)
    return {"rows": len(rows), "pass": len(rows) - len(failing), "failing": failing, "pass_swapped": sum(swapped.right)}


def timed(rows: list[Row]) -> dict:
    """1,000 completions on two workers that start cold."""
    chosen = [rows[index % len(rows)] for index in range(COMPLETIONS)]
    texts = [row.completion if index % 2 else rows[(index + 1) % len(rows)].completion for index, row in enumerate(chosen)]
    load, before, started = os.getloadavg()[0], used(), time.monotonic()
    with Sandbox() as sandbox:
        grade(chosen, texts, sandbox)
        seconds = time.monotonic() - started
    processor = used() - before  # of jails, known once they have ended
    return {"completions": COMPLETIONS, "workers": 2, "load": load, "seconds": seconds, "a_second": COMPLETIONS / seconds,
            "processor_seconds": processor, "a_second_on_two_free_cores": 2 * COMPLETIONS / processor}


def used() -> float:
    """Processor seconds of this process and of children that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in times)


def main(names: list[str]) -> None:
    """Grade, time and write."""
    found = {name: rows_of(name) for name in names}
    with Sandbox() as sandbox:
        graded = {Path(name.partition(":")[2]).name: solutions(rows, sandbox) for name, rows in found.items()}
        layers = describe(sandbox)
    rate = timed(found[names[0]])
    write_json(OUT, {"sandbox": layers, "solutions": graded, "rate": rate, "python": sys.version.split()[0]})
    for name, one in graded.items():
        print(f"{name}: {one['pass']} of {one['rows']} published solutions pass, {one['pass_swapped']} of another row's")
        for row in one["failing"]:
            print(f"  {row['entry']}: {row['status']}, {row['why']}")
    print(f"{COMPLETIONS} completions: {rate['a_second']:.0f}/s at load {rate['load']:.1f}, {rate['processor_seconds']:.1f} processor seconds")


if __name__ == "__main__":
    from words import words

    main(words(__doc__, lambda given: bool(given) and all(":" in word for word in given)))
