"""`--start RUN`: what a new run takes over from a finished one, so that another size costs some healing and no fit.

The graph, the gates and what was seen of the models are copied, receipts and all, so that the stages find them under the keys of their
inputs; the circuit is not copied: the search begins with it (`distill.search`).
"""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

from distill import config
from distill.runs import settings_of
from graphs.artifact import whole

OWN = ("out", "start", "keep", *config.BUDGETS, "target", "heal_tokens", "heal_decay", "heal_answers", "tune_rows", "prompts", "name", "json",
       "dry_run")
"""Settings that a run has of its own; the others are those of the run it starts from."""
COPIED = ("synthetic", "graph", ".work/gated", ".work/tune", ".work/judged")
"""Folders of a run."""


def inherited(verb: config.Prune) -> config.Prune:
    """`verb` with all settings that are not its own taken from the run it starts from, if there is one. Raises ValueError where one was asked
    to be different, where that run has not finished or has lost its gates, or is the run itself, or where what is asked does not go with it."""
    if verb.start is None:
        return verb
    if verb.start.resolve() == verb.out.resolve():
        raise ValueError(f"--start {verb.start}: that is this run's own folder; give another --out")
    there, plain = settings_of(verb.start, "--start"), config.Prune()
    names = [field.name for field in fields(verb) if field.name not in OWN]
    for name in names:
        asked = getattr(verb, name)
        if asked not in (getattr(plain, name), getattr(there, name)):
            raise ValueError(f"--{name.replace('_', '-')} {asked}: the run to start from has {getattr(there, name)}; leave the flag out, or --start")
    if not (verb.start / ".work" / "gated" / "receipt.json").is_file():
        raise ValueError(f"--start {verb.start}: its gates are gone (.work/gated); start that run's own command again, which makes them")
    taken = replace(verb, **{name: getattr(there, name) for name in names})
    config.check(taken)
    return taken


def take_over(verb: config.Prune) -> None:
    """Copy what is not in the run's folder yet, or is there from another start."""
    if verb.start is None:
        return
    for name in COPIED:
        here, there = verb.out / name, verb.start / name
        if there.is_dir() and not (here.is_dir() and _receipt(here) == _receipt(there)):
            with whole(here) as folder:
                shutil.copytree(there, folder, dirs_exist_ok=True)


def _receipt(folder: Path) -> bytes | None:
    """What a stage says of itself; nothing of a folder that is none."""
    return (folder / "receipt.json").read_bytes() if (folder / "receipt.json").is_file() else None
