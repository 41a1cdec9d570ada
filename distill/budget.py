"""Budgets: what a checkpoint may cost, and what a circuit of a given size costs as the class it compiles into.

    --target-params N      stored parameters, embeddings apart
    --target-ratio R       the same as a share of the model's own
    --target-memory MB     bytes of all weights in float32, embeddings included
    --target-nodes N       features (or neurons, or whole layers), and heads or their components, that are kept

Stored counts are the compiled class's: padding to the widest layer and units that a skip or a class adds are in them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from distill import config
from distill.compile import Target, legal_groups, shaped
from evals.size import Size, held
from graphs.prune import Size as Member
from graphs.prune import columns, kept_nodes, uneven
from graphs.replace import Replacement

MB = 1 << 20


def stored(circuit: Replacement, target: Target) -> Size:
    """What the compiled checkpoint will hold in float32; nothing is allocated. Of its `live` count nothing is known before compiling."""
    with torch.device("meta"):
        return held(shaped(circuit, target).model)


def cost(circuit: Replacement, kept: Mapping[str, Tensor], verb: config.Prune, whole: int) -> float:
    """What a circuit spends, in the unit of the verb's budget. whole: stored parameters of the model."""
    size = stored(circuit, verb.target)
    match verb.budget[0] if verb.budget else None:
        case "target_ratio":
            return size.stored / whole
        case "target_memory":
            return size.bytes / MB
        case "target_nodes":
            return sum(len(nodes) for nodes in kept.values())
        case _:
            return size.stored


def spent(replacement: Replacement, size: Member, verb: config.Prune, whole: int) -> float:
    """What a circuit of this size costs, whichever nodes it keeps."""
    order = {name: torch.zeros(count) for name, count in replacement.node_counts(size.components is not None).items()}
    kept = kept_nodes(order, size)
    return cost(replacement.pruned(kept, size.components is not None), kept, verb, whole)


def bought(replacement: Replacement, verb: config.Prune, whole: int, most: Member | None = None) -> Member:
    """The size that the verb's budget buys, known before anything is fitted: for each head count the largest within the budget (by
    bisection, for costs fall with features), and of these the one whose shares of heads and features are closest. most: only sizes that fit
    inside this one. Raises ValueError where even the smallest costs more, with what it costs."""
    assert verb.budget is not None
    name, limit = verb.budget
    every = columns(replacement, legal_groups(replacement.model, verb.target, verb.basis != "features"), verb.attention_nodes == "components")
    fitting = [[size for size in sizes if most is None or size.within(most)] for sizes in every]

    def price(size: Member) -> float:
        return spent(replacement, size, verb, whole)

    if (least := min(price(sizes[-1]) for sizes in fitting if sizes)) > limit:
        said = f"{least:,.0f}" if least >= 100 else f"{least:.3g}"
        raise ValueError(f"--{name.replace('_', '-')} {limit:g}: even the smallest circuit costs {said}; ask for more")
    found = [sizes[at] for sizes in fitting if (at := bisect_left(sizes, True, key=lambda size: price(size) <= limit)) < len(sizes)]
    return min(found, key=lambda size: uneven(size, replacement))
