"""How a training step grows with the width, the layers, the features, the tokens and the processes; writes results/scaling.json.

    python benchmarks/scaling.py            every point that the file does not hold yet
    python benchmarks/scaling.py POINT      one point (a JSON object, `Point`), as a process of its own: what the first form starts

The steps are those of `benchmarks/scale.py`, on a Llama of random weights: each transcoder alone (`fit: local`), all together with the local
loss beside (`fit: end to end`), gates. One axis is changed at a time. A point is a fresh process of one thread: processor seconds of a step, the
difference of a long and a short run, and how much its largest resident size grew over that of the loaded model. Processes share a batch's rows
over gloo, and their seconds are the clock's. An exponent is the slope of a straight line through the logarithms by least squares; beside it that
of the counted operations (`scale.operations`), which leave out attention's products, norms, losses and the optimiser.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import linear_regression

import scale
import torch

from distill.source import commit
from graphs import processes
from graphs.artifact import write_json

FILE = scale.ROOT / "results" / "scaling.json"
STEPS, LENGTH = 6, 64


@dataclass(frozen=True)
class Point:
    """A shape, and how many processes share its batch."""

    width: int = 256
    layers: int = 4
    features: int = 1024
    tokens: int = 1024
    processes: int = 1

    @property
    def shape(self) -> scale.Shape:
        """Of the Llama."""
        return scale.Shape("scaling", self.width, self.layers, 8, 8, 3 * self.width, 1024)


AXES = {"width": (64, 128, 256, 512), "layers": (2, 4, 8), "features": (256, 1024, 4096), "tokens": (256, 1024, 4096), "processes": (1, 2)}


def points() -> list[Point]:
    """Every point once."""
    return list(dict.fromkeys(replace(Point(), **{axis: value}) for axis, values in AXES.items() for value in values))


def steps_of(point: Point) -> dict[str, dict[str, float]]:
    """Of each stage: processor and clock seconds a step, and bytes that the largest resident size grew by."""
    torch.set_num_threads(1)
    targets = scale.prepared(point.shape, point.tokens // LENGTH, LENGTH)
    targets(targets.batches(0))
    found = {}
    for name, run in scale.stages(targets, point.features).items():
        before = largest()
        run(1)
        spent = []
        for steps in (1, 1 + STEPS):
            started = time.process_time(), time.perf_counter()
            run(steps)
            spent.append((time.process_time() - started[0], time.perf_counter() - started[1]))
        processor, clock = ((long - short) / STEPS for short, long in zip(*spent, strict=True))
        found[name] = {"processor": processor, "clock": clock, "memory": largest() - before}
    return found


def largest() -> int:
    """Bytes of the largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(point: Point) -> dict:
    """The point in a process, or processes, of its own."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(point.processes)] if point.processes > 1 else []
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run([sys.executable, *start, str(Path(__file__)), json.dumps(asdict(point))], env=quiet, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{point}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log value against log size."""
    return linear_regression(*([math.log(one) for one in some] for some in (sizes, values))).slope


def exponents(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """By axis and stage: of processor seconds and of counted operations, a step."""
    made = {Point(**row["point"]): row["stages"] for row in rows}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for axis, values in AXES.items():
        along = [replace(Point(), **{axis: value}) for value in values]
        if axis == "processes" or any(point not in made for point in along):
            continue
        found[axis] = {name: {
            "processor": exponent(list(values), [made[point][name]["processor"] for point in along]),
            "operations": exponent(list(values), [scale.operations(point.shape, point.features, name, known=True) * point.tokens for point in along]),
        } for name in made[along[0]]}
    return found


def main() -> None:
    """Measure what is missing, point by point."""
    found = json.loads(FILE.read_text()) if FILE.is_file() else {"torch": torch.__version__, "base": asdict(Point()), "rows": []}
    for point in points():
        if not any(row["point"] == asdict(point) for row in found["rows"]):
            found["rows"].append({"point": asdict(point), "commit": commit(), "stages": measured(point)})
            found["exponents"] = exponents(found["rows"])
            write_json(FILE, found)


if __name__ == "__main__":
    from words import words

    asked = words(__doc__, lambda given: len(given) <= 1)
    if not asked:
        main()
    else:
        taken = steps_of(Point(**json.loads(asked[0])))
        if processes.main():
            print(json.dumps(taken))
        processes.end(0)
