"""The processes of one command, where `accelerate launch` (or torchrun, or mpirun) has started several of it.

All of them run the same program on the same rows and hold the same weights; there is no server and no worker. What is shared
out, and how:

    training     each takes its share of the rows of every batch, and gradients are averaged (`graphs.shares`, `graphs.train`)
    measuring    whole batches are dealt out in turn, each as one process would have run it, and results gathered (`dealt`): the same to
                 the last bit
    the rest     grading, timing, choosing, printing and writing is the main process's; the others are told what came of it (`agreed`)

Nothing of this happens in one process: no library is loaded, and every function here returns what it was given. Which process this is
stands in the environment that the launcher made, so it is known before torch is imported. The folders of a run must be on a disk that
all processes see.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

A = TypeVar("A")
B = TypeVar("B")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What launchers call the number of processes: torchrun and accelerate; MPI's."""
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others. A launcher ends all where one dies, so this is for long gradings, not for deaths."""
_alone = False


def count() -> int:
    """How many processes the command has."""
    return _number(SIZES, 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _number(RANKS, 0) if count() > 1 else 0


def several() -> bool:
    """Whether this is one of several processes, and not doing something by itself."""
    return count() > 1 and not _alone


def main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def one_of_several_meant() -> bool:
    """Whether `accelerate launch` was asked for several processes and has started this one alone, as it does without a GPU or mpirun."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and not any(name in os.environ for name in SIZES)


def _number(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)


def state() -> Any:
    """accelerate's `PartialState`: num_processes, process_index, device. The first call meets the other processes."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=not torch.cuda.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU")), timeout=PATIENCE)


@contextmanager
def _by_itself() -> Iterator[None]:
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def agreed(make: Callable[[], A]) -> A:
    """What `make` gives the main process, which calls it by itself: the same for all, and an error too. To be called by all."""
    if not several():
        return make()
    from accelerate.utils import broadcast_object_list

    said: list[Any] = [None, None]
    state()  # meets the others, where nobody has yet
    if main():
        try:
            with _by_itself():
                said[0] = make()
        except Exception as error:  # the others must not wait for an answer that never comes
            broadcast_object_list([None, error if isinstance(error, ValueError | OSError) else RuntimeError(f"{type(error).__name__}: {error}")])
            raise
    broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


def dealt(work: Sequence[A], do: Callable[[A], B]) -> list[B]:
    """`do` of each item, in order. Of several processes each does its share, and all are given everything. To be called by all."""
    if not several():
        return [do(item) for item in work]
    from accelerate.utils import gather_object

    state()
    with _by_itself():
        mine = [(place, do(work[place])) for place in range(rank(), len(work), count())]
    return [done for _, done in sorted(gather_object(mine), key=lambda one: one[0])]


def turn(place: int) -> bool:
    """Whether the item at `place` of a list that is dealt out is this process's."""
    return not several() or place % count() == rank()


def end(status: int) -> NoReturn:
    """Leaves this process with `status`. One of several does so without taking its interpreter down: gloo's threads live on after their
    group is destroyed, and one that lets go of a tensor while the interpreter goes aborts the process (pytorch/pytorch#179291)."""
    if not several():
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
