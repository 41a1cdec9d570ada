"""Two processes for a test: forked from this one (nothing is imported again), met by gloo."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _child(function: Callable[..., Any], folder: Path, args: tuple) -> None:
    import torch
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.environ["RANK"] = str(torch.distributed.get_rank())
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent knew of one process
    (folder / os.environ["RANK"]).write_text(json.dumps(function(*args)))


def two(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `function(*args)` returns (as JSON) in each of two processes."""
    from accelerate import debug_launcher

    folder.mkdir(parents=True, exist_ok=True)
    debug_launcher(_child, (function, folder, args), num_processes=2)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]
