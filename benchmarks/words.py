"""What a benchmark's command was given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def words(about: str | None, fit: Callable[[Sequence[str]], bool] = lambda given: True) -> list[str]:
    """The words of the command. Prints what the module says of itself, usage included, and ends: with 0 where --help was asked for, with 2
    where the words do not fit."""
    given = sys.argv[1:]
    if "--help" in given or "-h" in given:
        print((about or "").strip())
        sys.exit(0)
    if not fit(given):
        refuse(about)
    return given


def refuse(about: str | None) -> NoReturn:
    """End where the words do not fit."""
    print((about or "").strip(), file=sys.stderr)
    sys.exit(2)


def numbers(given: Sequence[str]) -> bool:
    """Whether the words are numbers, one at least."""
    return bool(given) and all(word.isdigit() for word in given)
