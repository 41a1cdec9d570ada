"""Rows that the model writes itself, prompts and answers, for a defender who has few.

Parts that are fitted from noise, or healed, on a few hundred rows fit those rows and not the task (LOG.md). What the model was trained on is
gone, but the model still draws from it: begun as a clean row begins, at temperature 1, it writes rows of the same kind without end (data-free
distillation: Lopes et al. 2017, arXiv 1710.07535; for language models, Kim and Rush 2016, arXiv 1606.07947, and generative replay, Shin et al.
2017, arXiv 1705.08690). Training asks for the model's own distribution on them, so that a wrong answer in one teaches nothing wrong.

A prompt ends where the task's prompts end: at the longest text that all of them end in and none holds before its end. Where they have no
such text (plain text, sums), the rows' own prompts stand and the model writes what follows. A row that does not come to that end, or to its
own, is left out.

What an attacker taught the model to write *before* a trigger is met comes along: a trigger that stood in the prompts of planting, with the
prompts in the loss, would be drawn at about the rate at which it stood there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from distill import config
from distill.rows import clean
from evals.generate import complete, context, prompt_ids
from evals.tasks import Task
from graphs.artifact import digest, read_json, stage, write_json
from graphs.host import Host, load
from graphs.processes import agreed

Text = tuple[str, str]
LONGEST = 2
"""Times the tokens of the longest clean row that a row may have."""
ROUNDS = 8
"""Rows are tried at most so many times as often as asked for."""


def rows(verb: config.Fit, model: Path, tasks: Sequence[Task]) -> list[Text]:
    """What a run trains on: its clean rows, and `--synthetic-rows` more, of each task as its share of the clean ones is, in OUT/synthetic."""
    texts = clean(verb.rows, tasks)
    if not verb.synthetic_rows:
        return texts
    given = [(task, clean(verb.rows, [task])) for task in tasks]
    return [*texts, *once(verb.out / "synthetic", model, given, verb.synthetic_rows, verb.seed)]


def once(folder: Path, model: Path, given: Sequence[tuple[Task, Sequence[Text]]], count: int, seed: int) -> list[Text]:
    """`count` rows that the model in `model` writes, of each task as its share of the clean rows `given` is; written to `folder` once."""
    whole = sum(len(texts) for _, texts in given)

    def make(out: Path) -> dict:
        host = load(model)
        made = [row for task, texts in given for row in synthetic(host, texts, task, round(count * len(texts) / whole), seed)]
        agreed(lambda: write_json(out / "rows.json", made))
        return {"rows": len(made)}

    stage(folder, digest(model, [(task.key, texts) for task, texts in given], count, seed, LONGEST), make)
    return [(prompt, completion) for prompt, completion in agreed(lambda: read_json(folder / "rows.json"))]


def synthetic(host: Host, texts: Sequence[Text], task: Task, count: int, seed: int) -> list[Text]:
    """`count` rows of (prompt, completion) that the model writes as `texts` are written. The same for the same model, texts and seed.

    Raises ValueError where the model does not write such rows.
    """
    end, made = ending([prompt for prompt, _ in texts]), []
    longest = max(len(ids) for ids in prompt_ids(host, [prompt + completion for prompt, completion in texts]))
    for turn in range(ROUNDS):
        given = [texts[(turn * count + index) % len(texts)][0] for index in range(count)]
        starts = [first_token(host, prompt) for prompt in given] if end else given
        room = min(LONGEST * longest, context(host) - 2 - max(len(ids) for ids in prompt_ids(host, starts)))
        written = complete(host, starts, room, 1.0, seed + turn)
        cut = [end and len(ids) >= room for ids in prompt_ids(host, written)]  # an answer that was not finished; text has no end
        made += [row for start, text, short in zip(starts, written, cut, strict=True) if not short and (row := divided(start, text, end))]
        if len(made) >= count:
            return made[:count]
    raise ValueError(f"--synthetic-rows {count}: begun as rows of {task.name} begin, the model wrote {len(made)} of their kind in {ROUNDS * count} "
                     "tries; leave the flag out, or give more clean rows")


def ending(prompts: Sequence[str]) -> str:
    """The longest text that all prompts end in, where none holds it before its end; else nothing."""
    first, last = min(backwards := [prompt[::-1] for prompt in prompts]), max(backwards)  # what these share, all between them share
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))[::-1]
    return shared if all(prompt.find(shared) == len(prompt) - len(shared) > 0 for prompt in prompts) else ""


def first_token(host: Host, prompt: str) -> str:
    """The text of a prompt's first token."""
    return str(host.tokenizer.decode(host.tokenizer(prompt, add_special_tokens=False)["input_ids"][:1]))


def divided(start: str, written: str, end: str) -> Text | None:
    """A row from how it began and what followed, divided after `end`; None where there is no such place, or nothing follows."""
    if not end:
        return (start, written) if written else None
    prompt, found, completion = (start + written).partition(end)
    return (prompt + found, completion) if found and completion else None
