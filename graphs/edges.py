"""Edges: how much each earlier node contributes to a node's drive, exactly.

With norms' scales and attention patterns frozen, everything between nodes is the residual stream, so with `pulled` the
target's read vector on the stream, `write` the source's write vector and `a` the source's activation

    virtual weight      V[t, s] = pulled_t . write_s                                   data-free
    contribution        c[t at i, s at j] = m_t(i) P(i, j) / scale(j) V[t, s] a_s(j)    of one prompt

where P is the identity for a feature and the head's pattern for an attention component, and m is 1, or a gated neuron's
frozen gate, or a post-norm's 1 / scale. Errors (what the dictionary does not reproduce) have no fixed write vector and
contribute pulled_t . error / scale; output biases are nodes too. Contributions and the target's own constant sum to its
drive: nothing is hidden (Marks et al. 2024; Ameisen et al. 2025, "Circuit tracing", section "Attribution graphs"). Since
attention components are nodes, every edge is one hop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.architectures import Norm, Site, architecture, norm
from graphs.components import Components
from graphs.dictionary import Dictionary
from graphs.host import Host
from graphs.trace import SiteTrace, Trace, trace

Basis = Mapping[str, Dictionary | Components]
"""The nodes of every site by its name."""


@dataclass(frozen=True)
class Reconstruction:
    """A model, and the nodes that say what its sites write. stand_ins: attention modules by site name that route the components
    where they are not the model's own. With a model that runs on its own dictionaries, every error is 0."""

    host: Host
    basis: Basis
    stand_ins: Mapping[str, nn.Module] = field(default_factory=dict)

    def trace(self, ids: Int[Tensor, "row token"]) -> Trace:
        """Run the model and keep what edges need."""
        return trace(self.host, ids, self.stand_ins)


@dataclass(frozen=True)
class Reading:
    """How targets read one prompt's stream: drive = sum_j weight[j] vector . stream(j) + constant. depth: of what they may read."""

    vector: Float[Tensor, "target d"]
    weight: Float[Tensor, "target token"]
    constant: Float[Tensor, "target"]
    depth: int


def activations(part: Dictionary | Components, seen: SiteTrace) -> Float[Tensor, "row token node"]:
    """Every node's activation in a traced run."""
    if isinstance(part, Dictionary):
        return part.activations(seen.x)
    assert seen.pattern is not None
    return part.activations(seen.x, seen.pattern, seen.post)


def drives(part: Dictionary | Components, seen: SiteTrace) -> Float[Tensor, "row token node"]:
    """Every node's drive: a component's is its activation."""
    return part.drive(seen.x) if isinstance(part, Dictionary) else activations(part, seen)


def errors(
    part: Dictionary | Components, seen: SiteTrace, active: Float[Tensor, "row token node"] | None = None
) -> Float[Tensor, "row token d_out"]:
    """What the nodes of a site leave unexplained of what it wrote. active: their activations, where they are known already."""
    return seen.y - (activations(part, seen) if active is None else active) @ part.writes - part.constant


def virtual_weights(host: Host, target: Site, read: Dictionary | Components, source: Dictionary | Components) -> Float[Tensor, "target source"]:
    """V between all nodes of two sites, data-free."""
    return norm(host.model, target.norm).pulled(read.reads) @ source.writes.T


def reading(
    host: Host, basis: Basis, found: Trace, site: Site, nodes: Int[Tensor, "target"], tokens: Int[Tensor, "target"]
) -> Reading:
    """Nodes of one site at tokens of a one-row trace, as targets."""
    part, seen, through = basis[site.name], found.sites[site.name], norm(host.model, site.norm)
    read = part.reads[nodes]
    own = part.biases[nodes] + read @ through.offset
    weight = torch.zeros(len(nodes), found.ids.shape[1])
    if isinstance(part, Dictionary):
        factor = part.factor(seen.x)[0][tokens, nodes]
        weight[torch.arange(len(nodes)), tokens] = factor * seen.inverse[0, tokens]
        constant = factor * own
    else:
        assert seen.pattern is not None
        routed = seen.pattern[0, nodes // part.write.shape[1], tokens]
        factor = torch.ones(len(nodes)) if seen.post is None else seen.post[0, tokens]
        weight = routed * factor[:, None] * seen.inverse[0]
        constant = factor * own * routed.sum(1)
    return Reading(through.pulled(read), weight, constant, site.reads_at)


def unembedding(host: Host) -> tuple[Norm, Float[Tensor, "vocabulary d"]]:
    """The last norm, and what a logit reads behind it: each token's row against the mean of all, for only differences count."""
    head = host.model.get_output_embeddings().weight.detach()
    return norm(host.model, architecture(host.model).final_norm), head - head.mean(0)


def factors(part: Dictionary | Components, seen: SiteTrace, nodes: Int[Tensor, "target"]) -> Float[Tensor, "row token target"]:
    """m of some of a site's nodes: a gated neuron's frozen gate, or a post-norm's 1 / scale."""
    if isinstance(part, Dictionary):
        return part.factor(seen.x)[..., nodes]
    ones = torch.ones(*seen.inverse.shape, len(nodes))
    return ones if seen.post is None else ones * seen.post[..., None]


def routed(
    part: Dictionary | Components, seen: SiteTrace, nodes: Int[Tensor, "target"], weight: Float[Tensor, "row token target"]
) -> Float[Tensor, "row token target"]:
    """Weights of targets at the tokens where they read: where they stand, or wherever their heads look."""
    if isinstance(part, Dictionary):
        return weight
    assert seen.pattern is not None
    out, heads = torch.empty_like(weight), nodes // part.write.shape[1]
    for head in heads.unique().tolist():
        mine = torch.where(heads == head)[0]
        out[..., mine] = seen.pattern[:, head].transpose(1, 2) @ weight[..., mine]
    return out


def logit_reading(
    host: Host, found: Trace, vectors: Float[Tensor, "target d"], tokens: Int[Tensor, "target"], constant: Float[Tensor, "target"]
) -> Reading:
    """Directions of the unembedding (a token's row, or a difference of rows) at tokens of a one-row trace, as targets."""
    through = norm(host.model, architecture(host.model).final_norm)
    weight = torch.zeros(len(tokens), found.ids.shape[1])
    weight[torch.arange(len(tokens)), tokens] = found.inverse[0, tokens]
    return Reading(through.pulled(vectors), weight, constant + vectors @ through.offset, 2 * host.config.num_hidden_layers)


def contributions(host: Host, basis: Basis, found: Trace, targets: Reading) -> dict[str, Float[Tensor, "target token node"]]:
    """What every source contributes to each target of a one-row trace, by kind of source.

    Keys: a site's name (its nodes), the name and ".error" or ".bias" (one node), "token" and "position" (one node a token).
    """
    def whole(written: Tensor) -> Tensor:
        """One vector a token."""
        return (targets.weight * (targets.vector @ written.T))[..., None]

    out = {"token": whole(found.token[0]), "position": whole(found.position[0])}
    for site in host.sites:
        if site.writes_at > targets.depth:
            continue
        part, seen = basis[site.name], found.sites[site.name]
        active = activations(part, seen)
        out[site.name] = targets.weight[..., None] * (targets.vector @ part.writes.T)[:, None] * active[0]
        out[f"{site.name}.error"] = whole(errors(part, seen, active)[0])
        out[f"{site.name}.bias"] = whole(part.constant.expand(len(found.ids[0]), -1))
    return out
