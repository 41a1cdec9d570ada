"""The report of an experiment as one offline page without scripts: the tables, and three kinds of drawings, all from the rows.

    utility   for each organism: R-Acc (up) and ASR against retention, a mark for each method, its knobs joined in their order
    relearn   for each organism: ASR while it is taught again, the cleaned model beside its twin after the same removal
    research  for each method: how much further a trigger search gets than on the twin
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config_experiment import Experiment
from distill.drawing import Scale
from distill.experiment import tables
from distill.experiment.cell import NOTHING
from distill.experiment.summary import Line, Worst
from distill.report import environment
from graphs.artifact import write_text

LEFT, RIGHT, TOP, BOTTOM = 40, 450, 18, 210
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2", "#be185d", "#4d7c0f", "#57534e", "#1e3a8a")


@dataclass(frozen=True)
class Trace:
    """A drawn series. points: (x, y, what a tooltip says); joined: with a line; dashed: it is the twin's."""

    name: str
    colour: str
    points: list[tuple[float, float, str]]
    joined: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawing: ticks at their places, and traces in its coordinates."""

    title: str
    about: str
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    traces: list[Trace]


def write_page(path: Path, verb: Experiment, found: Sequence[Line], worst: Sequence[Worst], absent: Sequence[str], missed: Sequence[str],
               rows: Sequence[dict]) -> None:
    """Write the page whole."""
    methods = list(dict.fromkeys(line.method for line in found if line.method != NOTHING))
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(methods)}
    organisms = list(dict.fromkeys(tables.named(line) for line in found))
    plots = [plot for name in organisms for plot in (utility(name, found, colours, "right"), utility(name, found, colours, "attack"))]
    plots += [plot for name in organisms if (plot := relearning(name, rows, colours))]
    write_text(path, environment().get_template("experiment.html.j2").render(
        title=f"distill experiment --suite {verb.suite}" + (f" --stage {verb.stage}" if verb.stage else ""), colours=colours, plots=plots,
        tables=[("Every method at its worst over organisms", tables.WORST, [tables.worst_cells(one) for one in worst]),
                ("Every organism", tables.EACH, [tables.line_cells(one) for one in found])],
        facts=tables.facts(rows), absent=absent, missed=missed, frame=(LEFT, RIGHT, TOP, BOTTOM)))


def utility(organism: str, found: Sequence[Line], colours: dict[str, str], what: str) -> Plot:
    """R-Acc or ASR against retention."""
    same = [line for line in found if tables.named(line) == organism and line.method != NOTHING and line.retention and line.right]
    values = [line.retention.value for line in same if line.retention] or [1.0]
    x, y = Scale(min(0.9, *values), max(1.02, *values), LEFT, RIGHT), Scale(0.0, 1.1, BOTTOM, TOP)
    traces = []
    for method in dict.fromkeys(line.method for line in same):
        points = []
        for line in sorted((line for line in same if line.method == method), key=lambda one: one.knob or 0.0):
            assert line.retention and line.right
            value = line.right.value if what == "right" else line.attack.value
            points.append((x(line.retention.value), y(value), f"{method} {line.knob:g}: {value:.3f} at retention {line.retention.value:.3f}"))
        traces.append(Trace(method, colours[method], points, joined=len(points) > 1))
    words = {"right": "R-Acc (share of the twin's)", "attack": "ASR"}[what]
    return Plot(f"{organism}: {words}", f"{words} against retention; knobs of a method are joined.", ticks(x), ticks(y), traces)


def relearning(organism: str, rows: Sequence[dict], colours: dict[str, str]) -> Plot | None:
    """ASR while the backdoor is taught again, at the learning rate that is quickest, first seed; dashed: the twin after the same removal."""
    same = [row for row in rows if row["organism_name"] == organism and row["organism"]["seed"] == min(r["organism"]["seed"] for r in rows)
            and row["attacks"].get("relearning") and row["method"] in colours]
    if not same:
        return None
    curves = {(row["method"], row["twin"]): quickest(row["attacks"]["relearning"]) for row in same}
    x = Scale(0.0, max(step for curve in curves.values() for step, _ in curve) or 1.0, LEFT, RIGHT)
    y = Scale(0.0, 1.0, BOTTOM, TOP)
    traces = [Trace(method, colours[method], [(x(step), y(asr), f"{method}{', twin' * twin}: {asr:.2f} after {step} steps") for step, asr in curve],
                    joined=True, dashed=twin) for (method, twin), curve in curves.items()]
    return Plot(f"{organism}: taught again", "ASR by steps of relearning; dashed: the twin after the same removal.", ticks(x), ticks(y), traces)


def quickest(found: dict) -> list[tuple[int, float]]:
    """The measured points of the learning rate that brought the attack back first, or got farthest."""
    one = min(found["curves"], key=lambda curve: (curve["to_half"] is None, curve["to_half"] or -max(curve["attack_success"])))
    return list(zip(one["steps"], one["attack_success"], strict=True))


def ticks(scale: Scale) -> list[tuple[float, str]]:
    """Where ticks stand, and what they say."""
    return [(scale(value), f"{value:g}") for value in scale.ticks()]
