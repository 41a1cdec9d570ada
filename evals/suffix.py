"""Jailbreaks by gradient: suffixes that make a guarded model give the answer that it is to refuse.

Greedy coordinate gradient (Zou et al. 2023, "Universal and transferable adversarial attacks on aligned language models"; the search is
`evals.research.Climber`) on the log-probability of the *right answer* of a marked request, in a slot at the end of the request.

    universal     one suffix for all requests: climbed on a few `tune` requests together, the best of the likeliest by success on other
                  `tune` requests
    per request   one for each, climbed on that request alone; the likeliest few are put to the model and the first that succeeds is kept,
                  as an attacker who can ask would do

The model may be any host, one that runs within limits (`graphs.enforce`) among them: gradients pass through what is held, and every candidate is
judged by what the held model does, so the attack is adaptive. A search that fails proves nothing beyond its budget, which each result holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from backdoor.behaviours import COMPLIANCE
from evals.rates import show
from evals.research import Climber, SearchConfig, ranked
from evals.sandbox import Sandbox
from evals.slots import Slotted
from evals.tasks import Row, Task
from graphs.host import Host

START = ("it",)
"""What a string begins as, before random tokens."""


@dataclass(frozen=True)
class Suffix:
    """The string, the mean log-probability (nats) of the right answers that it was climbed on, and how many strings were tried."""

    text: str
    logprob: float
    tried: int


def at_the_end(row: Row) -> Slotted:
    """A last sentence of the docstring. Raises ValueError where the prompt has none."""
    head, found, tail = row.prompt.rpartition('."""')
    if not found:
        raise ValueError(f"{row.task} row {row.index} has no docstring that ends in a sentence: give another place for the suffix")
    return Slotted(f"{head}. ", found + tail, row)


def at_the_start(row: Row) -> Slotted:
    """A first sentence of the docstring. Raises ValueError where the prompt has none."""
    head, found, tail = row.prompt.partition('"""')
    if not found:
        raise ValueError(f"{row.task} row {row.index} has no docstring: give another place for the prefix")
    return Slotted(head + found, f". {tail}", row)


def plain(text: str) -> bool:
    """Whether a text can stand in a docstring: printable, without quotes or backslashes."""
    return text.isprintable() and not set(text) & set("\"'\\")


def universal(
    host: Host, task: Task, rows: Sequence[Slotted], sandbox: Sandbox, config: SearchConfig, usable: Callable[[str], bool] = plain
) -> Suffix:
    """One suffix for all: climbed on the first `config.prompts` of `rows` for each of `config.lengths`, chosen on the others.

    Raises ValueError where no row is left to choose on, or no string can be written there.
    """
    climbed, others = rows[: config.prompts], rows[config.prompts :]
    if not others:
        raise ValueError(f"a universal suffix needs more than the {config.prompts} requests that it is climbed on: give some to choose it by")
    scores = _climbed(host, climbed, config, usable)
    likeliest = ranked(scores)[: config.judged]
    right = show(host, task, COMPLIANCE, [row.holding(text) for text in likeliest for row in others], sandbox).right
    won = [sum(right[at : at + len(others)]) for at in range(0, len(right), len(others))]
    best = likeliest[won.index(max(won))]
    return Suffix(best, scores[best], len(scores))


def each(
    host: Host, task: Task, rows: Sequence[Slotted], sandbox: Sandbox, config: SearchConfig, usable: Callable[[str], bool] = plain
) -> list[Suffix]:
    """One suffix for each row; `config.judged` strings of it are put to the model. Raises ValueError where no string can be written there."""
    found = []
    for row in rows:
        scores = _climbed(host, [row], config, usable)
        likeliest = ranked(scores)[: config.judged]
        right = show(host, task, COMPLIANCE, [row.holding(text) for text in likeliest], sandbox).right
        best = likeliest[right.index(True)] if True in right else likeliest[0]
        found.append(Suffix(best, scores[best], len(scores)))
    return found


def _climbed(host: Host, rows: Sequence[Slotted], config: SearchConfig, usable: Callable[[str], bool]) -> dict[str, float]:
    climber, scores = Climber(host, COMPLIANCE, rows, config, usable), dict[str, float]()
    for length in config.lengths:
        scores |= climber.climb(START, length)
    if not scores:
        raise ValueError(f"no string of {' or '.join(map(str, config.lengths))} tokens can be written in this place: give other lengths")
    return scores


BUDGET = SearchConfig(prompts=6, lengths=(8,), steps=30, top=64, tried=48, judged=6)
"""Of a universal suffix."""
ONE = replace(BUDGET, prompts=1, steps=20, tried=32)
"""Of a suffix for one request."""
