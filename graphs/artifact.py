"""Atomic folders: an artifact is either whole or absent.

Whatever takes long is written into a hidden sibling folder and renamed when complete, so a killed process leaves the
old state or the new one, never half. Every artifact carries a receipt (what made it) and can be loaded with no memory
of the command that made it. A *stage* is an artifact named by the hash of its inputs: the same inputs find it again. Of several processes the main
one locks and writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from graphs.processes import agreed, main


def digest(*parts: Any) -> str:
    """A 16-digit hex hash of JSON-able parts, dataclasses and paths (folders by their files' content)."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
                if file.is_file():
                    with file.open("rb") as handle:
                        total.update(file.name.encode() + b"\0" + hashlib.file_digest(handle, "sha256").digest())
        else:
            value = asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
            total.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\0")
    return total.hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename. Characters that UTF-8 cannot hold become question marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=1, default=_plain) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; raises ValueError in one sentence where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give a folder that holds it") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not valid JSON: restore the file or make it again") from None


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: convert it to plain lists, numbers and texts")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it when the block ends well, and vanishes when it does not."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            trash = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
            folder.rename(trash)
            temporary.rename(folder)
            shutil.rmtree(trash, ignore_errors=True)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stage(folder: Path, key: str, make: Callable[[Path], dict]) -> tuple[dict, bool]:
    """Make `folder` unless it is already there with the same `key` (the hash of all its inputs).

    `make(temporary)` writes the files and returns the receipt. Returns (receipt, whether it was found). Several processes make it together, and
    leave the writing to the main one (`agreed`): the others are given a folder that is not there.
    """
    receipt = folder / "receipt.json"

    def known() -> dict | None:
        return found if receipt.is_file() and (found := read_json(receipt)).get("key") == key else None

    if (found := agreed(known)) is not None:
        return found, True
    with whole(folder) if main() else nullcontext(folder) as out:
        made = {"key": key} | make(out)
        agreed(lambda: write_json(out / "receipt.json", made))
    return agreed(lambda: read_json(receipt)), False


@contextmanager
def taken(lock: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the file `lock`, which dies with its process; yields whether it was free. wait: until it is."""
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        yield free


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one command. Raises ValueError where another one is running in it."""
    with ExitStack() as held:
        def hold() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # what /proc and its like say
                raise ValueError(f"--out {folder}: no folder can be made there; give another --out") from None
            if not held.enter_context(taken(folder / ".lock")):
                raise ValueError(f"--out {folder}: another run is using this folder; wait for it or give another --out")

        agreed(hold)
        yield
