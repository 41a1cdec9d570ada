"""What numbers come from: the commit of the source, and the versions of what they depend on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the source tree, where this runs from one."""
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "tokenizers", "datasets")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
