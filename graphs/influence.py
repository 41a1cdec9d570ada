"""Influence: how much of a prompt's outcome passes through every node, exactly and for all nodes at once.

Each target's contributions are divided by the sum of their absolute values, so that the shares of its parents sum to 1; a
node's influence is the sum over all paths to the outcome of the product of shares along the path (Ameisen et al. 2025,
"Circuit tracing", appendix "Graph pruning"). The graph is a DAG, so one pass from the deepest site to the shallowest is
exact; and since a contribution is V[t, s] times what is free of t, or routed by the target's head, each step is a few
matrix products over the nodes that fire somewhere in the prompt: no adjacency matrix is made and no node is left out.

    norm(t, i)       = sum_j P(i, j) / scale(j) sum_s |V[t, s]| |a_s(j)|
    influence(s, j) += |a_s(j)| / scale(j) sum_t |V[t, s]| sum_i P(i, j) influence(t, i) / norm(t, i)

The two scores are those of circuit-tracer (`compute_graph_scores`), over all nodes instead of a selection:

    replacement    influence that starts in tokens (and learned positions), as a share of that and what starts in errors
    completeness   share of nodes' parents that are no errors, averaged by influence on the outcome

Output biases are constants of the model, and circuit-tracer's graphs have none: they are left out of the shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.architectures import Site, norm
from graphs.components import Components
from graphs.dictionary import Dictionary
from graphs.edges import Reconstruction, activations, errors, unembedding
from graphs.trace import Trace


@dataclass(frozen=True)
class Outcome:
    """Logits whose influences are asked for: vocabulary entries at a token, weighted by their probabilities."""

    vocabulary: tuple[int, ...]
    weights: tuple[float, ...]
    token: int


@dataclass(frozen=True)
class Influence:
    """Influence on the outcome: of a site's nodes and its error, of tokens' embeddings and of learned positions; the scores."""

    nodes: dict[str, Float[Tensor, "token node"]]
    error: dict[str, Float[Tensor, "token"]]
    token: Float[Tensor, "token"]
    position: Float[Tensor, "token"]
    outcome: Outcome
    replacement: float
    completeness: float


def likely(found: Trace, token: int = -1, mass: float = 0.95, most: int = 10) -> Outcome:
    """The likeliest next tokens that hold `mass` of the probability, at most `most`, weighted by it."""
    at = token % found.ids.shape[1]
    p, order = found.logits[0, at].softmax(-1).sort(descending=True)
    count = min(most, int((p.cumsum(0) < mass).sum()) + 1)
    return Outcome(tuple(order[:count].tolist()), tuple(p[:count].tolist()), at)


@dataclass
class _Pass:
    """What flows back: influence by source, and the running totals of the scores."""

    nodes: dict[str, Tensor]
    error: dict[str, Tensor]
    token: Tensor
    position: Tensor
    clean: float = 0.0
    total: float = 0.0


def influence(subject: Reconstruction, found: Trace, outcome: Outcome) -> Influence:
    """Influences of one prompt (a one-row trace) on `outcome`."""
    host, length = subject.host, found.ids.shape[1]
    made = {name: activations(part, found.sites[name]) for name, part in subject.basis.items()}
    gone = {name: errors(part, found.sites[name], made[name])[0] for name, part in subject.basis.items()}
    acts = {name: active[0] for name, active in made.items()}
    live = {name: _live(subject.basis[name], a) for name, a in acts.items()}
    sizes = {name: a[:, live[name]].abs() for name, a in acts.items()}
    written = {name: subject.basis[name].writes[live[name]] for name in acts}
    none = {name: torch.zeros(length) for name in ("token", "position", *acts)}
    back = _Pass({name: torch.zeros_like(a) for name, a in sizes.items()}, {name: none[name] for name in acts}, none["token"], none["position"])
    through, table = unembedding(host)
    chosen = list(outcome.vocabulary)
    vectors = through.pulled(table[chosen])
    arriving = torch.zeros(length, len(chosen))
    arriving[outcome.token] = torch.tensor(outcome.weights)
    own = found.inverse[0]

    def step(pulled: Tensor, arriving: Tensor, pattern: Tensor | None, inverse: Tensor, depth: int) -> None:
        """Hand the influence that arrives at targets ("token target", read by `pulled`) on to their sources."""
        weights = {site.name: (pulled @ written[site.name].T).abs() for site in host.sites if site.writes_at <= depth}
        leaves = {name: (gone[name] @ pulled.T).abs() for name in weights}
        leaves |= {"token": (found.token[0] @ pulled.T).abs(), "position": (found.position[0] @ pulled.T).abs()}
        inner = sum(leaves.values()) + sum(sizes[name] @ v.T for name, v in weights.items())  # "source token, target"
        inner = inner * inverse[:, None]
        total = inner if pattern is None else pattern @ inner
        share = arriving / total.clamp_min(1e-12)
        reaching = (share if pattern is None else pattern.T @ share) * inverse[:, None]
        for name, v in weights.items():
            back.nodes[name] += sizes[name] * (reaching @ v)
            back.error[name] += (reaching * leaves[name]).sum(1)
        back.token += (reaching * leaves["token"]).sum(1)
        back.position += (reaching * leaves["position"]).sum(1)
        lost = sum((reaching * leaves[name]).sum() for name in weights)
        back.total += float(arriving.sum())
        back.clean += float(arriving.sum() - lost)

    step(vectors, arriving, None, own, 2 * host.config.num_hidden_layers)
    for site in sorted(host.sites, key=lambda site: -site.writes_at):
        _site(subject, found, site, live[site.name], back, step)
    inputs, wrong = float(back.token.sum() + back.position.sum()), float(sum(one.sum() for one in back.error.values()))
    # tokens, positions and errors have no parents: each counts as fully explained, as in circuit-tracer
    complete = (back.clean + inputs + wrong) / (back.total + inputs + wrong)
    whole = {name: torch.zeros_like(a).index_copy_(1, live[name], back.nodes[name]) for name, a in acts.items()}
    return Influence(whole, back.error, back.token, back.position, outcome, inputs / (inputs + wrong), complete)


def _live(part: Dictionary | Components, active: Float[Tensor, "token node"]) -> Int[Tensor, "live"]:
    """The nodes that the prompt needs: features that fire at some token, all components."""
    return (active != 0).any(0).nonzero().flatten() if isinstance(part, Dictionary) else torch.arange(active.shape[1])


def _site(subject: Reconstruction, found: Trace, site: Site, live: Int[Tensor, "live"], back: _Pass, step) -> None:
    """One site's live nodes as targets: features together, components head by head."""
    part, seen = subject.basis[site.name], found.sites[site.name]
    pulled, arriving = norm(subject.host.model, site.norm).pulled(part.reads[live]), back.nodes[site.name]
    if not isinstance(part, Components):
        step(pulled, arriving, None, seen.inverse[0], site.reads_at)
        return
    assert seen.pattern is not None
    width = part.write.shape[1]
    for head, pattern in enumerate(seen.pattern[0]):
        mine = slice(head * width, (head + 1) * width)
        step(pulled[mine], arriving[:, mine], pattern, seen.inverse[0], site.reads_at)
