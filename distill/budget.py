"""Budgets: what a checkpoint may cost, and what a circuit of a given size costs as the class it compiles into.

    --target-params N      stored parameters, embeddings apart
    --target-ratio R       the same as a share of the model's own
    --target-memory MB     bytes of all weights in float32, embeddings included
    --target-nodes N       features (or neurons, or whole layers), and heads or their components, that are kept

Stored counts are the compiled class's: padding to the widest layer and units that a skip or a class adds are in them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill import config
from distill.compile import Target, legal_groups, shaped
from evals.size import Size, held
from graphs.prune import Size as Member
from graphs.prune import family, kept_nodes
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


def affordable(
    replacement: Replacement, order: Mapping[str, Tensor], sizes: Sequence[Member], verb: config.Prune, whole: int
) -> Member:
    """The largest of `sizes` (largest first) within the budget, by bisection: costs fall with size. Raises ValueError where even the
    smallest costs more, with what it costs."""
    assert verb.budget is not None
    name, limit = verb.budget

    def spent(size: Member) -> float:
        kept = kept_nodes(order, size)
        return cost(replacement.pruned(kept, size.components is not None), kept, verb, whole)

    if (least := spent(sizes[-1])) > limit:
        said = f"{least:,.0f}" if least >= 100 else f"{least:.3g}"
        raise ValueError(f"--{name.replace('_', '-')} {limit:g}: even the smallest circuit costs {said}; ask for more")
    return sizes[bisect_left(sizes, True, key=lambda size: spent(size) <= limit)]


def bought(replacement: Replacement, verb: config.Prune, whole: int) -> Member:
    """The size that the verb's budget buys, known before anything is fitted: costs do not depend on which nodes are kept. Raises ValueError as
    `affordable` does."""
    components = verb.attention_nodes == "components"
    sizes = family(replacement, legal_groups(replacement.model, verb.target, verb.basis != "features"), components)
    order = {name: torch.zeros(count) for name, count in replacement.node_counts(components).items()}
    return affordable(replacement, order, sizes, verb, whole)
