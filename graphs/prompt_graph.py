"""The graph of one prompt: the nodes that most of an outcome's influence passes through, with a position axis.

1. Influence of every node on the outcome, exactly (`graphs.influence`).
2. Keep the fewest nodes that hold `node_share` of it (at most `most`), the prompt's tokens and the outcome's logits.
3. Exact contributions between what is kept; keep the edges that hold `edge_share` of what passes through them, and drop
   nodes that are left without children, or without parents where they read (cf. circuit-tracer's `prune_graph`).

A different type from `FeatureGraph`: a node here is a node there, at a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.edges import Reading, Reconstruction, activations, errors, logit_reading, reading, unembedding
from graphs.graph import Index, Kind, index
from graphs.influence import Influence, Outcome, influence, likely
from graphs.trace import Trace


@dataclass(frozen=True)
class PromptNode:
    """node: number in the `Index`; token: place in the prompt; depth: sublayers below what it writes."""

    node: int
    name: str
    kind: Kind
    token: int
    depth: int
    activation: float
    influence: float


@dataclass(frozen=True)
class PromptGraph:
    """Nodes in order of depth, edges as (source, target, contribution) by place in `nodes`; scores over all nodes, kept or not.

    tokens: text of each token; outcome: the logits asked for; kept: share of all influence that the kept nodes hold.
    """

    tokens: tuple[str, ...]
    nodes: tuple[PromptNode, ...]
    src: Int[Tensor, "edge"]
    dst: Int[Tensor, "edge"]
    weight: Float[Tensor, "edge"]
    outcome: Outcome
    kept: float
    replacement: float
    completeness: float


def attribute(
    subject: Reconstruction, ids: Int[Tensor, "1 token"], node_share: float = 0.8, edge_share: float = 0.98, most: int = 3000, token: int = -1
) -> PromptGraph:
    """The graph of a prompt's next token (of what follows `token`)."""
    found, nodes = subject.trace(ids), index(subject.host, subject.basis)
    flows = influence(subject, found, likely(found, token))
    seen = _see(subject, nodes, found)
    chosen, share = _choose(seen, flows, node_share, most)
    matrix = _contributions(seen, chosen, flows.outcome)
    alive, edges = _prune(matrix, chosen, edge_share)
    place = alive.cumsum(0) - 1
    dst, src = torch.where(edges)
    return PromptGraph(
        tuple(nodes.tokens[i] for i in ids[0].tolist()), tuple(one for one, keep in zip(chosen, alive.tolist(), strict=True) if keep),
        place[src], place[dst], matrix[dst, src], flows.outcome, share, flows.replacement, flows.completeness)


@dataclass(frozen=True)
class _Seen:
    """A traced prompt by site: activations, write vectors and errors."""

    subject: Reconstruction
    nodes: Index
    found: Trace
    acts: dict[str, Float[Tensor, "token node"]]
    written: dict[str, Float[Tensor, "node d"]]
    gone: dict[str, Float[Tensor, "token d"]]

    def node(self, name: str, token: int, place: int, size: float) -> PromptNode:
        """One node by its block, token and place in the block."""
        block = self.nodes.by_name[name]
        match block.kind:
            case "error":
                level = float(self.gone[name.removesuffix(".error")][token].norm())
            case "logit":
                level = float(self.found.logits[0, token, place])
            case "token" | "position":
                level = 1.0
            case _:
                level = float(self.acts[name][token, place])
        depth = block.depth if block.kind in ("token", "position") else block.depth + 1
        return PromptNode(block.start + place, self.nodes.name(block.start + place), block.kind, token, depth, level, size)

    def vector(self, one: PromptNode) -> Float[Tensor, "d"]:
        """What a node adds to the stream."""
        block = self.nodes.block(one.node)
        match one.kind:
            case "token":
                return self.found.token[0, one.token]
            case "position":
                return self.found.position[0, one.token]
            case "error":
                return self.gone[block.name.removesuffix(".error")][one.token]
            case _:
                return one.activation * self.written[block.name][one.node - block.start]


def _see(subject: Reconstruction, nodes: Index, found: Trace) -> _Seen:
    parts = subject.basis.items()
    active = {name: activations(part, found.sites[name]) for name, part in parts}
    return _Seen(subject, nodes, found, {name: a[0] for name, a in active.items()}, {name: part.writes for name, part in parts},
                 {name: errors(part, found.sites[name], active[name])[0] for name, part in parts})


def _choose(seen: _Seen, flows: Influence, node_share: float, most: int) -> tuple[list[PromptNode], float]:
    """The nodes to keep in order of depth, logits last; and the share of all influence that features, components and errors among
    them hold."""
    entries = [*flows.nodes.items(), *((f"{name}.error", one[:, None]) for name, one in flows.error.items())]
    flat = torch.cat([one.flatten() for _, one in entries])
    best, order = flat.topk(min(most, len(flat)))
    running, whole = best.cumsum(0), flat.sum()
    count = min(len(best), int((running < node_share * whole).sum()) + 1, int((flat > 0).sum()))
    starts = torch.tensor([0, *(one.numel() for _, one in entries)]).cumsum(0)
    chosen = []
    for at in order[:count].tolist():
        which = int(torch.searchsorted(starts, at, right=True)) - 1
        name, values = entries[which]
        token, place = divmod(at - int(starts[which]), values.shape[1])
        chosen.append(seen.node(name, token, place, float(flat[at])))
    for token, i in enumerate(seen.found.ids[0].tolist()):
        chosen.append(seen.node("token", token, i, float(flows.token[token])))
        if seen.nodes.by_name["position"].count:
            chosen.append(seen.node("position", token, token, float(flows.position[token])))
    chosen.sort(key=lambda one: (one.depth, one.token, one.node))
    ends = [seen.node("logit", flows.outcome.token, v, w) for v, w in zip(flows.outcome.vocabulary, flows.outcome.weights, strict=True)]
    return chosen + ends, float(running[count - 1] / whole) if count else 0.0


def _contributions(seen: _Seen, chosen: list[PromptNode], outcome: Outcome) -> Float[Tensor, "target source"]:
    """Exact contributions between the chosen nodes."""
    sources = [one for one in chosen if one.kind != "logit"]
    vectors, tokens = torch.stack([seen.vector(one) for one in sources]), torch.tensor([one.token for one in sources])
    ends = {site.name: site.writes_at for site in seen.subject.host.sites}
    homes = [seen.nodes.block(one.node).name for one in chosen]
    writes_at = torch.tensor([ends.get(home.removesuffix(".error"), 0) for home in homes[: len(sources)]])
    matrix = torch.zeros(len(chosen), len(chosen))
    for name in (*ends, "logit"):
        block = seen.nodes.by_name[name]
        rows = [i for i, home in enumerate(homes) if home == name]
        if rows:
            targets = _reading(seen, name, [chosen[i] for i in rows], block.start, outcome)
            below = int((writes_at <= targets.depth).sum())  # sources are in order of depth
            matrix[rows, :below] = (targets.vector @ vectors[:below].T).mul_(targets.weight[:, tokens[:below]])
    return matrix


def _reading(seen: _Seen, name: str, targets: list[PromptNode], start: int, outcome: Outcome) -> Reading:
    host, places = seen.subject.host, torch.tensor([one.node - start for one in targets])
    tokens = torch.tensor([one.token for one in targets])
    if name == "logit":
        return logit_reading(host, seen.found, unembedding(host)[1][places], tokens, torch.zeros(len(targets)))
    return reading(host, seen.subject.basis, seen.found, host.site(name), places, tokens)


def _prune(
    matrix: Float[Tensor, "node node"], chosen: list[PromptNode], edge_share: float
) -> tuple[Bool[Tensor, "node"], Bool[Tensor, "node node"]]:
    """Which nodes and edges stay."""
    size = matrix.abs()
    size /= size.sum(1, keepdim=True).clamp_min(1e-10)
    through = torch.tensor([one.influence if one.kind == "logit" else 0.0 for one in chosen])
    for depth in sorted({one.depth for one in chosen}, reverse=True):  # a DAG: each depth is final when its turn comes
        rows = torch.tensor([place for place, one in enumerate(chosen) if one.depth == depth])
        through = through + through[rows] @ size[rows]
    scores = size.mul_(through[:, None])
    edges = scores >= _bound(scores, edge_share).clamp_min(torch.finfo(scores.dtype).tiny)
    ends = torch.tensor([one.kind in ("token", "logit") for one in chosen])
    read = torch.tensor([one.kind in ("feature", "attention") for one in chosen])
    alive = torch.ones(len(chosen), dtype=torch.bool)
    while True:
        stays = alive & (ends | edges.any(0)) & (~read | edges.any(1))
        if bool((stays == alive).all()):
            return alive, edges
        alive = stays
        edges = edges & alive[:, None] & alive


def _bound(scores: Float[Tensor, "node node"], share: float) -> Float[Tensor, ""]:
    """The least of the fewest scores that hold `share` of all. Only scores of the octave that it lies in are sorted."""
    found = scores[scores > (1 - share) * scores.mean()]  # the others hold less than what may be left out
    if not len(found):
        return scores.new_zeros(())
    left, exponent = share * float(scores.sum()), torch.frexp(found).exponent
    octave = exponent.max() - exponent
    sums = torch.bincount(octave, found.double()).cumsum(0)
    place = min(int((sums < left).sum()), len(sums) - 1)
    ordered = found[octave == place].sort(descending=True).values
    reached = ordered.cumsum(0, dtype=torch.float64) + (float(sums[place - 1]) if place else 0.0)
    return ordered[min(int((reached < left).sum()), len(ordered) - 1)]
