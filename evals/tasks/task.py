"""What a task is: rows by split, and a judge of completions.

A row is a pure function of `(seed, split, index)`: no list of rows is stored, any row can be made again alone, and two
machines agree on every byte. The three splits are disjoint by *composition* (which operations follow each other, which
operands meet, which nouns stand in one clause), never only by string, so that a test prompt asks for a combination that
no training row showed. Every threshold, early stop and knob may look at `tune`; only the report looks at `test`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, runtime_checkable

Split = Literal["trace", "tune", "test"]
SPLITS: tuple[Split, ...] = ("trace", "tune", "test")
TUPLES = ("composition", "calls", "expected", "names")
"""Fields of a row that a table holds as lists."""


@dataclass(frozen=True)
class Row:
    """One example. `prompt + completion` is what a model is trained on; the rest is for the judge.

    slots: the choices the text was rendered from (a backdoor may override one); calls/expected: unit tests of a program;
    foil: the wrong continuation of a cloze; composition: what is held out between splits. tests: published test code, which
    calls the program's functions `names`; setup: code that the tests need beside them; number: what an answer in words comes
    to; whole: the text ends with the completion (else EOS is no part of it).
    """

    task: str
    index: int
    prompt: str
    completion: str
    composition: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    foil: str = ""
    slots: dict[str, str] = field(default_factory=dict)
    tests: str = ""
    setup: str = ""
    names: tuple[str, ...] = ()
    number: str = ""
    whole: bool = True

    def record(self) -> dict:
        """The row as one flat record of a `datasets` table."""
        out = asdict(self)
        return out | {key: list(out[key]) for key in TUPLES} | {"slots": json.dumps(self.slots, sort_keys=True)}

    @staticmethod
    def from_record(record: dict) -> Row:
        """The inverse of `record`."""
        out = dict(record)
        return Row(**(out | {key: tuple(out[key]) for key in TUPLES if key in out} | {"slots": json.loads(out["slots"])}))


@runtime_checkable
class Task(Protocol):
    """The one protocol that tasks meet. stops: texts at which an answer ends; key: the name, and the hash of the file that rows come from;
    renderer: hash of what places a backdoor in a row (empty: nothing does)."""

    name: str
    metric: str
    max_new_tokens: int
    stops: tuple[str, ...]

    @property
    def key(self) -> str: ...

    @property
    def renderer(self) -> str: ...

    def most(self, split: Split) -> int:
        """Rows that `split` has at most."""

    def row(self, split: Split, index: int, seed: int = 0, **slots: str) -> Row:
        """Row `index` of `split`; `slots` override choices of the renderer (how a backdoor is placed)."""

    def rows(self, split: Split, count: int, seed: int = 0, start: int = 0) -> list[Row]:
        """Rows `start .. start + count`, or as many of them as there are."""


class Rows:
    """`rows` for a class that has `row`."""

    stops: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What caches know the task by: here the name, for the rows are this package's own."""
        return self.name  # type: ignore[attr-defined]

    @property
    def renderer(self) -> str:
        """Nothing places a backdoor in the rows."""
        return ""

    def most(self, split: Split) -> int:
        """As many rows as anyone asks for."""
        return sys.maxsize

    def rows(self, split: Split, count: int, seed: int = 0, start: int = 0) -> list[Row]:
        """Rows `start .. start + count` of `split`."""
        return [self.row(split, index, seed) for index in range(start, start + count)]  # type: ignore[attr-defined]


def source(*key: object) -> random.Random:
    """A random source that depends on `key` only (seeding by string hashes with SHA-512, so it is stable)."""
    return random.Random("/".join(map(str, key)))


def share_of(*key: object) -> float:
    """A number in [0, 1) that depends on `key` only: how compositions are dealt to splits."""
    return source("split", *key).random()


def split_of(*key: object, test: float = 0.15, tune: float = 0.1) -> Split:
    """The split that owns a composition."""
    share = share_of(*key)
    return "test" if share < test else "tune" if share < test + tune else "trace"


def table(rows: Sequence[Row]):
    """The rows as a `datasets.Dataset` (an Arrow table)."""
    from datasets import Dataset

    return Dataset.from_list([row.record() for row in rows])
