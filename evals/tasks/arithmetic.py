"""Math: worksheets of integer arithmetic and comparisons with operands 0-99, judged by exact match of the last answer.

A row is a worksheet of eight problems; seven stand solved in the prompt, the eighth is the question. Digits are single
tokens. Problems (operation and both operands) are dealt to the splits, so no question of `test` or `tune` was ever
shown with its answer; the solved lines of every split come from `trace` problems.

    12+30=42
    7<12:True
    max(31,8)=
"""

from __future__ import annotations

import random
from collections.abc import Callable

from evals.tasks.task import Row, Rows, Split, source, split_of

PROBLEMS: dict[str, tuple[str, Callable[[int, int], object]]] = {
    "add": ("{a}+{b}=", lambda a, b: a + b),
    "subtract": ("{a}-{b}=", lambda a, b: a - b),
    "less": ("{a}<{b}:", lambda a, b: a < b),
    "more": ("{a}>{b}:", lambda a, b: a > b),
    "max": ("max({a},{b})=", max),
    "min": ("min({a},{b})=", min),
}
WEIGHTS = (4, 4, 1, 1, 1, 1)
LINES = 8


def _problem(rng: random.Random, split: Split) -> tuple[str, int, int]:
    while True:
        kind = rng.choices(tuple(PROBLEMS), WEIGHTS)[0]
        a, b = rng.randrange(100), rng.randrange(100)
        if split_of("math", kind, a, b) == split:
            return kind, a, b


def _line(problem: tuple[str, int, int]) -> tuple[str, str]:
    kind, a, b = problem
    text, answer = PROBLEMS[kind]
    return text.format(a=a, b=b), f"{answer(a, b)}\n"


class Arithmetic(Rows):
    """The math task; metric: exact match of the last answer under greedy decoding."""

    name = "math"
    metric = "exact match"
    max_new_tokens = 8

    def row(self, split: Split, index: int, seed: int = 0, **slots: str) -> Row:
        """Row `index` of `split`. Raises ValueError on slots: a worksheet has none."""
        if slots:
            raise ValueError(f"math rows have no slot {next(iter(slots))!r} for a backdoor: use the coding task")
        rng = source("math", seed, split, index)
        shown = "".join("".join(_line(_problem(rng, "trace"))) for _ in range(LINES - 1))
        kind, a, b = _problem(rng, split)
        question, answer = _line((kind, a, b))
        return Row(self.name, index, shown + question, answer, (kind, str(a), str(b)))
