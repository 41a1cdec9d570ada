"""Surroundings: rows of a task in contexts longer than their own.

    few-shot N      behind as many whole rows of the same task as fit into N tokens
    distractor N    behind as many whole rows of the package's other tasks

What is judged is the last row's completion alone. A graph that was fitted on single rows has met neither.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.rows import DEFENDER_SEED
from evals.tasks import TASKS, Row, Task
from graphs.batches import Encoded, encode
from graphs.host import Host

LENGTHS = (256, 512)
"""Tokens of a whole context."""
MORE = 16
"""Rows drawn beside those that are judged, so that each has others before it."""


def behind(row: Encoded, before: Sequence[Encoded], most: int) -> Encoded | None:
    """The row behind the first of `before` that fit into `most` tokens with it; None where none fits."""
    ids: tuple[int, ...] = ()
    for one in before:
        if len(ids) + len(one.ids) + len(row.ids) > most:
            break
        ids += one.ids
    return Encoded(ids + row.ids, len(ids) + row.prompt) if ids else None


def surroundings(host: Host, tasks: Sequence[Task], count: int) -> dict[str, list[Encoded]]:
    """`count` rows of each task's test split in every longer context that the model can hold. Rows that do not fit are left out."""
    found: dict[str, list[Encoded]] = {}
    for task in tasks:
        rows = _encoded(host, task.rows("test", count + MORE, seed=DEFENDER_SEED))
        others = [one.rows("test", count + MORE, seed=DEFENDER_SEED) for one in TASKS.values() if one.name != task.name]
        around = {"few-shot": rows, "distractor": _encoded(host, [row for pair in zip(*others, strict=True) for row in pair])}
        for length in LENGTHS:
            if length > host.config.max_position_embeddings:
                continue
            for kind, before in around.items():
                made = (behind(row, [*before[at + 1 :], *before[:at]], length) for at, row in enumerate(rows[:count]))
                found.setdefault(f"{kind} {length}", []).extend(one for one in made if one is not None)
    return {name: rows for name, rows in found.items() if rows}


def _encoded(host: Host, rows: Sequence[Row]) -> list[Encoded]:
    return encode(host.tokenizer, [(row.prompt, row.completion) for row in rows], host.config.max_position_embeddings)
