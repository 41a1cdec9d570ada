"""Curves: how much of the task a share of the nodes, or of the edges, carries, from none to all.

At each share the best nodes of every site are open and the others replaced by their means (attention's and layers' by zero), or the best edges
are kept and the others held at their means (`graphs.edge_prune`); nothing is healed:

    faithfulness(s) = (m(s) - m(0)) / (m(1) - m(0)),   m: mean log-probability of the completion's tokens
    CPR = area under faithfulness over the share        CMD = area between faithfulness and 1

(Mueller et al. 2025, "MIB: a mechanistic interpretability benchmark", section 3). CPR alone can be gained by circuits that answer
better than the whole, so KL to the model stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.batches import Batch
from graphs.edge_prune import best
from graphs.edge_run import EdgeModel, Edges
from graphs.losses import divergence
from graphs.replace import Replacement

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's."""
EDGE_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Of edges."""
Run = Callable[[Int[Tensor, "row token"]], Float[Tensor, "row token vocabulary"]]


@dataclass(frozen=True)
class Point:
    """share of nodes or edges; nodes: how many; kl: nats a completion token; faithfulness: see the module."""

    share: float
    nodes: int
    kl: float
    faithfulness: float


@dataclass(frozen=True)
class Curve:
    """Points by share, and the two areas."""

    points: tuple[Point, ...]
    cpr: float
    cmd: float


def opened(order: Mapping[str, Float[Tensor, "_node"]], share: float) -> dict[str, Float[Tensor, "_node"]]:
    """Gates with the best `share` of every site's nodes open (rounded up, so that a share above 0 opens one)."""
    gates = {}
    for name, value in order.items():
        count = -int(-share * len(value) // 1)
        gates[name] = torch.zeros_like(value).index_fill(0, value.topk(count).indices, 1.0)
    return gates


def trace_curve(
    replacement: Replacement, order: Mapping[str, Float[Tensor, "_node"]], batches: Sequence[Batch],
    targets: Sequence[Float[Tensor, "row token vocabulary"]], shares: Sequence[float] = SHARES,
) -> Curve:
    """The curve of `order` on `batches`, with the model's logits on them as `targets`. shares: rising, from 0 to 1.

    Raises ValueError where the whole is no better than nothing: faithfulness has no meaning there.
    """
    def at(share: float) -> tuple[int, Run]:
        gates = opened(order, share)

        def logits(ids: Int[Tensor, "row token"]) -> Float[Tensor, "row token vocabulary"]:
            with replacement.gated(gates):
                return replacement(ids)
        return sum(int(gate.sum()) for gate in gates.values()), logits

    return _curve(at, batches, targets, shares)


def trace_edge_curve(
    run: EdgeModel, scores: Mapping[str, Float[Tensor, "_target _source"]], edges: Edges,
    batches: Sequence[Batch], targets: Sequence[Float[Tensor, "row token vocabulary"]], shares: Sequence[float] = EDGE_SHARES,
) -> Curve:
    """The same of the edges that `scores` rank, those of `edges` being counted. Every edge is kept again when it returns."""
    def at(share: float) -> tuple[int, Run]:
        kept = best(scores, edges, share)
        run.keep(kept).fix()
        return sum(int((kept[name] & mask).sum()) for name, mask in edges.items()), run

    try:
        return _curve(at, batches, targets, shares)
    finally:
        run.keep(best(scores, edges, 1.0))


@torch.no_grad()
def _curve(
    at: Callable[[float], tuple[int, Run]], batches: Sequence[Batch], targets: Sequence[Float[Tensor, "row token vocabulary"]],
    shares: Sequence[float],
) -> Curve:
    """Points and areas. at: how many are kept of a share, and what runs then."""
    found = []
    for share in shares:
        count, run = at(share)
        likelihood, kl, tokens = 0.0, 0.0, 0
        for batch, target in zip(batches, targets, strict=True):
            logits = run(batch.ids)
            said = batch.completion[:, 1:]
            picked = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0][said]
            likelihood, kl = likelihood + float(picked.sum()), kl + float(divergence(logits, target, batch, 0.0)) * len(picked)
            tokens += len(picked)
        found.append((share, count, kl / tokens, likelihood / tokens))
    nothing, whole = found[0][3], found[-1][3]
    if whole <= nothing:
        raise ValueError("the whole graph predicts the task no better than none of it: fit it for longer (--fit-steps, --joint-steps)")
    points = tuple(Point(share, count, kl, (value - nothing) / (whole - nothing)) for share, count, kl, value in found)
    place, faith = (torch.tensor([getattr(point, key) for point in points], dtype=torch.float64) for key in ("share", "faithfulness"))
    return Curve(points, float(torch.trapezoid(faith, place)), float(torch.trapezoid((1 - faith).abs(), place)))
