"""Prompts as a user gives them: one a line, in which \\n stands for a line break, or JSON lines with a field `prompt`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path


def lines(file: Path, flag: str) -> Iterator[str]:
    """The file's lines. Raises ValueError where there is none of that name."""
    try:
        with file.open() as handle:
            yield from handle
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{flag} {file}: no such file; give one prompt a line, or JSON lines with a field `prompt`") from None


def texts(found: Iterable[str], where: str) -> Iterator[str]:
    """The prompts of lines, as they come; empty ones are passed over. where: what an error names. Raises ValueError where a line is no prompt."""
    for line in found:
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"] if line.lstrip().startswith("{") else line.rstrip("\n").replace("\\n", "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{where}: a line that begins with {{ is not JSON with a field `prompt`; correct it: {line.strip()[:60]}") from None
        if not isinstance(text, str):
            raise ValueError(f"{where}: a field `prompt` is no text; put it in quotes")
        yield text
