"""A process's share of a batch, and what the shares amount to together.

A batch's loss is a sum over its tokens over what all of them weigh. A process that holds a share of the rows divides the sum over
its own tokens by the *mean* over processes of what their tokens weigh. The mean over processes of such losses is then the batch's
loss, and the mean of their gradients (which is what DDP and FSDP2 take) its gradient: exactly, but for the order of sums. What a loss
divides by never depends on what is trained, so no gradient flows through `averaged`. A loss that every process takes on the whole batch
is averaged to itself: sharing is never needed for the result to be right.

With FSDP2, weights, gradients and moments lie in shards between steps, and `gathered` shows whole weights to whatever reads or changes
them elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graphs.batches import Batch
from graphs.processes import count, rank, several, state


def share(batch: Batch) -> Batch:
    """This process's rows of the batch: every n-th, so that long and short ones fall to all. Raises ValueError where some process gets none."""
    if not several():
        return batch
    if len(batch.ids) < count():
        raise ValueError(f"--batch {len(batch.ids)}: fewer rows than the {count()} processes; give at least {count()}, or start fewer processes")
    mine = slice(rank(), None, count())
    return Batch(batch.ids[mine], batch.real[mine], batch.completion[mine], batch.rows[mine])


def total(value: Tensor) -> Tensor:
    """The sum of `value` over processes, detached."""
    if not several():
        return value.detach()
    from accelerate.utils import reduce

    state()
    return reduce(value.detach(), "sum")


def averaged(value: Tensor) -> Tensor:
    """The mean of `value` over processes, detached."""
    return total(value) / count() if several() else value.detach()


def averaged_all(values: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each over processes, detached."""
    if not several():
        return [value.detach() for value in values]
    together = averaged(torch.cat([value.flatten() for value in values]))
    return [part.view_as(value) for part, value in zip(together.split([value.numel() for value in values]), values, strict=True)]


def weighed(mean: Float[Tensor, ""], weight: int) -> Float[Tensor, ""]:
    """A mean over this process's share as its part of the whole batch's. weight: how many it is the mean of."""
    return mean * (weight / averaged(torch.tensor(float(weight), device=mean.device))) if several() else mean


def center(rows: Float[Tensor, "token d"]) -> Float[Tensor, "d"]:
    """The mean over the tokens of all processes, detached."""
    if not several():
        return rows.detach().mean(0)
    sums = total(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])]))
    return sums[:-1] / sums[-1]


@torch.no_grad()
def same(module: nn.Module) -> None:
    """Give every process the main one's weights and buffers: after something that may round differently on different machines."""
    if several():
        from accelerate.utils import broadcast

        state()
        for value in (*module.parameters(), *module.buffers()):
            broadcast(value.data)


def in_shards(value: Tensor) -> bool:
    """Whether FSDP2 holds this tensor in shards."""
    if not several():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def full(value: Tensor) -> Tensor:
    """The whole of a tensor that may lie in shards. To be called by all."""
    return value.full_tensor() if in_shards(value) else value  # type: ignore[attr-defined]


@torch.no_grad()
def put(place: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may lie in shards."""
    place.copy_(like(value, place))


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the other's device, and laid out in shards as that one is."""
    if not in_shards(other):
        return value.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


def make_whole(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put whole weights in the place of all that lie in shards, one after the other; returns what was there, and where."""
    found = [(owner, name, held) for owner in module.modules() for name, held in owner._parameters.items() if held is not None and in_shards(held)]
    whole: dict[int, nn.Parameter] = {}
    for owner, name, held in found:
        if id(held) not in whole:  # a tied weight stays one
            whole[id(held)] = nn.Parameter(full(held.detach()), requires_grad=held.requires_grad)
        owner._parameters[name] = whole[id(held)]
    return found


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every weight is whole on every process; what is changed there goes back into the shards."""
    found = make_whole(module)
    try:
        yield
    finally:
        for owner, name, held in found:
            whole = owner._parameters[name]
            assert whole is not None
            put(held, whole.detach())
            owner._parameters[name] = held
