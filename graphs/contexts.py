"""Contexts: where in a task's text a node is most active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.batches import Batch
from graphs.edges import Reconstruction, activations, unembedding
from graphs.graph import Block, FeatureGraph

AROUND = 12
"""Tokens shown on either side."""


@dataclass(frozen=True)
class Context:
    """One occurrence: the node's activation, and the text before, at and after the token."""

    activation: float
    before: str
    token: str
    after: str


@torch.no_grad()
def top_contexts(
    subject: Reconstruction, graph: FeatureGraph, nodes: Sequence[int], batches: Sequence[Batch], count: int = 5
) -> dict[int, list[Context]]:
    """By node, the `count` rows in which it is most active (by absolute activation), each at its strongest token; fewer where it is
    silent. One pass over the rows for all nodes."""
    wanted: dict[Block, list[int]] = {}
    for node in nodes:
        wanted.setdefault(graph.index.block(node), []).append(node)
    best: dict[Block, list[tuple[Tensor, Tensor]]] = {block: [] for block in wanted}
    rows: list[list[int]] = []
    for batch in batches:
        seen = subject.trace(batch.ids)
        for block, mine in wanted.items():
            values = seen.logits if block.kind == "logit" else activations(subject.basis[block.name], seen.sites[block.name])
            values = values[..., torch.tensor(mine) - block.start].masked_fill(~batch.real[..., None], 0.0)
            places = values.abs().argmax(1)
            best[block].append((values.gather(1, places[:, None])[:, 0], places))
        rows += [ids[real].tolist() for ids, real in zip(batch.ids, batch.real, strict=True)]
    found: dict[int, list[Context]] = {}
    for block, mine in wanted.items():
        values, places = (torch.cat(parts) for parts in zip(*best[block], strict=True))
        top = values.abs().sort(dim=0, descending=True, stable=True).indices[:count]
        for column, node in enumerate(mine):
            found[node] = [_context(subject, float(values[row, column]), rows[row], int(places[row, column]))
                           for row in top[:, column].tolist() if values[row, column] != 0]
    return found


def _context(subject: Reconstruction, size: float, ids: list[int], at: int) -> Context:
    decode = subject.host.tokenizer.decode
    return Context(size, str(decode(ids[max(0, at - AROUND) : at])), str(decode([ids[at]])), str(decode(ids[at + 1 : at + 1 + AROUND])))


def logit_effects(subject: Reconstruction, graph: FeatureGraph, node: int, count: int = 6) -> list[tuple[str, float]]:
    """Tokens that a unit of the node's activation raises most and lowers most, directly, at unit scale of the last norm."""
    block = graph.index.block(node)
    if block.kind not in ("feature", "attention"):
        return []
    through, table = unembedding(subject.host)
    effect = through.pulled(table) @ subject.basis[block.name].writes[node - block.start]
    order = effect.argsort(descending=True).tolist()
    return [(graph.index.tokens[token], float(effect[token])) for token in (*order[:count], *order[-count:])]
