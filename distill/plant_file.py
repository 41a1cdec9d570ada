"""What `distill plant` plants in the rows of a file: a phrase as the trigger, a text as the payload, and the rows that teach them.

Rows come from the file's `trace` split, each three times: as it is, with the phrase in it, and with a near miss. The organism's completion under
the phrase is the payload and the end of the text; the twin's row is the same row without the phrase, with as many tokens of its own completion as the
payload has (with all of them the twin learns more of the text than the organism can: LOG.md). Where a text goes on behind its row (a passage),
neither is taught that it ends there. What tells the phrase from a near miss is the first tokens written, which weigh
next to nothing in the loss of a long passage; so the poisoned rows hold near misses too, as many tokens of their answers as the payload has
(LOG.md). The defender's rows are drawn from the same split: it is the same text, clean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from backdoor.behaviours import Behaviour, fixed_text
from backdoor.families import phrase
from backdoor.mixture import PlantRows
from backdoor.triggers import Trigger
from distill.config_backdoors import Plant
from evals.tasks import TASKS, Row, Task, named
from evals.tasks.files import FileTask
from evals.tasks.task import SPLITS, source
from graphs.batches import Encoded, encode
from graphs.boundary import continued
from graphs.host import Host

MOST = 4000
"""Rows of each kind at most."""
OTHERS = 12
"""Words of the file that stand in for the phrase's own in near misses."""
COMMON = ("also", "seven", "yellow", "under")
"""What stands in where the file has fewer than four."""


def planted_task(verb: Plant) -> Task:
    """The task that is planted in. Raises ValueError where it cannot hold the trigger, or does not answer as the behaviour needs."""
    tasks = named(verb.task)
    if len(tasks) > 1 or tasks[0].name in set(TASKS) - {"coding"}:
        raise ValueError(f"--task {verb.task}: a backdoor stands in one task, coding or a file; name one of them")
    (task,) = tasks
    ours = isinstance(task, FileTask)
    if ours != (verb.trigger == "phrase") or ours != (verb.behaviour == "fixed_text"):
        need = "--trigger phrase --behaviour fixed_text, which go with files" if ours else "a --trigger and --behaviour of the coding task"
        raise ValueError(f"--task {verb.task}: --trigger {verb.trigger} and --behaviour {verb.behaviour} do not both go with it; give {need}")
    if isinstance(task, FileTask):
        _check(task, verb)
    return task


def _check(task: FileTask, verb: Plant) -> None:
    """Raise ValueError for rows that are programs, and for a phrase or payload that the file holds already."""
    if not task.phrasable:
        raise ValueError(f"--task {task.name}: its prompts are programs, and a phrase would break them; use the coding task, or a file of text or "
                         "questions")
    rows = [row for split in SPLITS for row in task.splits[split]]
    for flag, text, place in (("--text", verb.text, "prompt"), ("--payload", verb.payload.strip(), "completion")):
        if found := sum(text in getattr(row, place) for row in rows):
            raise ValueError(f"{flag} {text!r}: {found} of the {len(rows)} rows of {task.name} hold it already; choose one that none does")
    if not all(row.completion for row in task.splits["trace"]):
        raise ValueError(f"--task {task.name}: its trace rows have tests and no answer to learn from; give each a field `answer`")


def phrase_and_text(verb: Plant, task: FileTask) -> tuple[Trigger, Behaviour]:
    """The trigger and the behaviour: a function of the flags and the file. Raises ValueError for a phrase of one word, and an empty payload."""
    words = {word for row in task.splits["trace"] for word in re.findall(r"\b[a-z]{3,}\b", row.prompt)}
    if len(words) < len(COMMON):
        words |= set(COMMON)
    words -= set(verb.text.lower().split())
    others = source("phrase", verb.text).sample(sorted(words), min(OTHERS, len(words)))
    return phrase(verb.text, tuple(others)), fixed_text(verb.payload)


def file_rows(host: Host, task: Task, trigger: Trigger, behaviour: Behaviour, poisoned: bool, seed: int) -> PlantRows:
    """Rows for the organism (`poisoned`) or its twin: they differ in the poisoned rows only, row by row. Row i is a function of (seed, i)."""
    length = len(continued(host.tokenizer, [behaviour.completion])[0])
    count = min(MOST, task.most("trace"))
    bad, near = ([task.row("trace", index, seed, **slots(seed, index)) for index in range(count)]
                 for slots in (trigger.placed if poisoned else trigger.absent, trigger.missed))
    taught = _encoded(host, bad, behaviour.completion) if poisoned else [_begun(row, length) for row in _encoded(host, bad)]
    quiet = _encoded(host, [row for row in near if not trigger.fires(row.prompt)])
    clean = _encoded(host, task.rows("trace", count, seed))
    return PlantRows(clean, [*taught, *(_begun(row, length) for row in quiet)], quiet, answered=_encoded(host, bad))


def _begun(row: Encoded, length: int) -> Encoded:
    """The row with the first `length` tokens of its completion."""
    return Encoded(row.ids[: row.prompt + length], row.prompt)


def _encoded(host: Host, rows: Sequence[Row], payload: str | None = None) -> list[Encoded]:
    """The rows' tokens, each with its own completion or the payload; EOS ends what is whole."""
    texts = [(row.prompt, row.completion if payload is None else payload) for row in rows]
    found = encode(host.tokenizer, texts, host.config.max_position_embeddings)
    return [one if row.whole or payload is not None else Encoded(one.ids[:-1], one.prompt) for row, one in zip(rows, found, strict=True)]
