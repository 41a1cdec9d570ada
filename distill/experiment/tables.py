"""The tables in Markdown: every method at its worst, then every organism. Generated from rows, nothing typed."""

from __future__ import annotations

from collections.abc import Sequence

from distill.experiment.cell import NOTHING
from distill.experiment.summary import Line, Worst
from evals.relearning import CostRatio
from evals.statistics import Score

ABSENT = "-"


def markdown(found: Sequence[Line], worst: Sequence[Worst], absent: Sequence[str], missed: Sequence[str], rows: Sequence[dict]) -> str:
    """The whole report as Markdown."""
    return "\n\n".join([
        "Every method at its worst over organisms:", table(WORST, [worst_cells(one) for one in worst]),
        "Every organism:", table(EACH, [line_cells(one) for one in found]), facts(rows), *lists(absent, missed)]) + "\n"


WORST = ("method", "organisms", "retention", "R-Acc", "ASR", "relearning", "re-search", "parameters")
EACH = ("organism", "method", "knob", "seeds", "retention", "R-Acc", "ASR", "FTR", "relearning", "re-search", "leak", "parameters")


def worst_cells(one: Worst) -> list[str]:
    """A method's row."""
    return [one.method, str(one.organisms), three(one.retention), three(one.right), bounded(one.attack), cost(one.relearning),
            signed(one.research), f"{one.stored:,}"]


def line_cells(one: Line) -> list[str]:
    """An organism's row."""
    return [named(one), one.method, ABSENT if one.knob is None else f"{one.knob:g}", str(one.seeds), interval(one.retention), interval(one.right),
            bounded(one.attack), bounded(one.false), cost(one.relearning), signed(one.research), signed(one.leak, 2), f"{one.stored:,}"]


def named(one: Line) -> str:
    """The organism, and what is unusual of the defender's rows."""
    unusual = [(f", {one.rows} rows", one.rows != 512), (", pair met clean", one.met), (", wanted", one.wanted)]
    return one.organism + "".join(said for said, is_so in unusual if is_so)


def facts(rows: Sequence[dict]) -> str:
    """What every cell has in common, and what the columns mean."""
    one = next((row for row in rows if row["method"] != NOTHING), rows[0])
    return (f"{one['steps']:,} training batches a removal, {one['prompts']} prompts a rate, base {one['base']}, renderer {one['renderer']}. "
            "Retention, R-Acc: shares of the untouched twin's, with 95 % intervals (seeds, then prompts). ASR, FTR: with exact upper bounds. "
            "Relearning: steps to half the attack, as a share of the twin's after the same removal. Re-search: best attack found, minus the same "
            "on that twin. Leak: payload log-probability minus that twin's, nats."
            + (" Wanted: ASR says how much of what the owner wants is there still." if any(row.get("wanted") for row in rows) else ""))


def lists(absent: Sequence[str], missed: Sequence[str]) -> list[str]:
    """What is not there, and which organisms are none."""
    return [*(["Missed the plant gate:\n\n" + "\n".join(f"- {one}" for one in missed)] if missed else []),
            *([f"Not made yet ({len(absent)} cells):\n\n" + "\n".join(f"- {one}" for one in absent)] if absent else [])]


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *cells])


def three(value: float | None) -> str:
    """Three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign."""
    return ABSENT if value is None else f"{value:+.{digits}f}"


def interval(score: Score | None) -> str:
    """A ratio with its interval."""
    return ABSENT if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def bounded(score: Score) -> str:
    """A rate with its exact upper bound."""
    return f"{score.value:.3f} (<= {score.high:.3f})"


def cost(ratio: CostRatio | None) -> str:
    """A relearning cost, or what bounds it where a model was not seen to relearn."""
    if ratio is None:
        return ABSENT
    if ratio.value is not None:
        return f"{ratio.value:.2f}"
    return f">= {ratio.low:.2f}" if ratio.high is None else f"<= {ratio.high:.2f}"
