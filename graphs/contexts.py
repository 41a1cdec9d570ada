"""Contexts: where in a task's text a node is most active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphs.architectures import architecture, norm
from graphs.batches import Batch
from graphs.edges import Reconstruction, activations, writes
from graphs.graph import FeatureGraph

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
def top_contexts(subject: Reconstruction, graph: FeatureGraph, node: int, batches: Sequence[Batch], count: int = 5) -> list[Context]:
    """The `count` rows in which `node` is most active (by absolute activation), each at its strongest token; fewer where it is silent."""
    block = graph.index.block(node)
    found: list[tuple[float, float, list[int], int]] = []
    for batch in batches:
        seen = subject.trace(batch.ids)
        values = seen.logits if block.kind == "logit" else activations(subject.basis[block.name], seen.sites[block.name])
        value = values[..., node - block.start].masked_fill(~batch.real, 0.0)
        best = value.abs().argmax(1)
        for row, place in enumerate(best.tolist()):
            size = float(value[row, place])
            found.append((abs(size), size, batch.ids[row][batch.real[row]].tolist(), place))
    found.sort(key=lambda one: -one[0])
    return [_context(subject.host.tokenizer.decode, size, ids, at) for strength, size, ids, at in found[:count] if strength > 0]


def logit_effects(subject: Reconstruction, graph: FeatureGraph, node: int, count: int = 6) -> list[tuple[str, float]]:
    """Tokens that a unit of the node's activation raises most and lowers most, directly, at unit scale of the last norm."""
    block = graph.index.block(node)
    if block.kind not in ("feature", "attention"):
        return []
    host = subject.host
    head, through = host.model.get_output_embeddings().weight.detach(), norm(host.model, architecture(host.model).final_norm)
    effect = through.pulled(head - head.mean(0)) @ writes(subject.basis[block.name])[node - block.start]
    order = effect.argsort(descending=True).tolist()
    return [(graph.index.tokens[token], float(effect[token])) for token in (*order[:count], *order[-count:])]


@torch.no_grad()
def every_context(subject: Reconstruction, graph: FeatureGraph, batches: Sequence[Batch], count: int = 3) -> dict[int, list[Context]]:
    """`top_contexts` of every feature and component in one pass over the rows."""
    blocks = [block for block in graph.index.blocks if block.kind in ("feature", "attention")]
    best: dict[str, list[tuple]] = {block.name: [] for block in blocks}
    rows: list[list[int]] = []
    for batch in batches:
        seen = subject.trace(batch.ids)
        for block in blocks:
            values = activations(subject.basis[block.name], seen.sites[block.name]).masked_fill(~batch.real[..., None], 0.0)
            places = values.abs().argmax(1)
            best[block.name].append((values.gather(1, places[:, None])[:, 0], places))
        rows += [ids[real].tolist() for ids, real in zip(batch.ids, batch.real, strict=True)]
    decode, found = subject.host.tokenizer.decode, {}
    for block in blocks:
        values, places = (torch.cat(parts) for parts in zip(*best[block.name], strict=True))
        top = values.abs().topk(min(count, len(values)), dim=0).indices
        for node in range(block.count):
            chosen = [(float(values[row, node]), rows[row], int(places[row, node])) for row in top[:, node].tolist() if values[row, node] != 0]
            found[block.start + node] = [_context(decode, *one) for one in chosen]
    return found


def _context(decode, size: float, ids: list[int], at: int) -> Context:
    return Context(size, str(decode(ids[max(0, at - AROUND) : at])), str(decode([ids[at]])), str(decode(ids[at + 1 : at + 1 + AROUND])))
