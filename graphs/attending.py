"""Attending: which pairs of nodes make a head look where it looks (a report; patterns stay frozen in the graph).

A head's score is bilinear in what the two tokens' nodes wrote, once norms' scales are frozen (cf. Kamath et al. 2025, "Tracing
attention computation through feature interactions"):

    score(i, j) = scale * q(i) . k(j) = sum over nodes t at i, s at j of   c(t, s; i, j)

with rotary positions turning both sides. A term that is the same for all j does nothing, so what a pair of nodes does is how
much it raises the score of where the head looks above that of where it could look:

    gain(t, s) = mean over i of  sum_j (P(i, j) - 1 / visible(i)) c(t, s; i, j)

All pairs, with one more node a side for biases ("constant"), sum to the mean of sum_j (P - 1 / visible) log P: the head's own.
A row of text is a cluster, for standard errors. Pairs are summed in blocks of targets that stay inside `memory` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.architectures import Norm, Site, attention_scores, norm, or_zeros
from graphs.attention import turned
from graphs.batches import Batch
from graphs.edges import Reconstruction
from graphs.flow import Seen, Sources, ratio_error, see, sources
from graphs.graph import index
from graphs.trace import SiteTrace

CONSTANT, ANY = "constant", "anything"


@dataclass(frozen=True)
class Pair:
    """asks: node at the token that looks; answers: node at the token that is looked at; gain with its standard error; share: of the
    absolute gains of all pairs. A side that is "anything" is summed over."""

    asks: str
    answers: str
    gain: float
    error: float
    share: float


@dataclass(frozen=True)
class Attending:
    """A head. pairs: largest absolute gain first; asking and answering: single nodes, summed over the other side; gain: of all pairs
    together; first, same, previous: share of the pattern on the first token, the token itself and the one before."""

    head: str
    pairs: tuple[Pair, ...]
    asking: tuple[Pair, ...]
    answering: tuple[Pair, ...]
    gain: float
    first: float
    same: float
    previous: float
    tokens: int


@dataclass(frozen=True)
class _Side:
    """One side of a head's score: its weights as read vectors on the stream, what is left over, an inner norm."""

    pulled: Float[Tensor, "inside d"]
    constant: Float[Tensor, "inside"]
    inner: Norm | None
    weight: Float[Tensor, "inside d_in"]
    bias: Float[Tensor, "inside"]

    def parts(self, source: Sources, seen: Seen, site: SiteTrace, row: int, length: int, rotates: bool) -> Float[Tensor, "node token inside"]:
        """What every source, and last the constant, adds to this side at each token of a row."""
        inverse, count = site.inverse[row, :length], len(source.numbers)
        level = seen.activations[row, :length, :count].T[..., None] * (source.writes @ self.pulled.T)[:, None]
        if len(missing := torch.where(source.error)[0]):
            level[missing] = seen.errors[: len(missing), row, :length] @ self.pulled.T
        whole = torch.cat([level * inverse[:, None], self.constant.expand(1, length, -1)])
        if self.inner is not None:
            whole = whole * self.inner.gain * self.inner.inverse(site.x[row, :length] @ self.weight.T + self.bias)[:, None]
        if not rotates or site.rotary is None:
            return whole
        return turned(whole, *(angles[row % len(angles), :length] for angles in site.rotary))


def _side(through: Norm, weight: Tensor, bias: Tensor, inner: Norm | None) -> _Side:
    return _Side(through.pulled(weight), weight @ through.offset + bias, inner, weight, bias)


@torch.no_grad()
def attending(
    subject: Reconstruction, site: Site, head: int, batches: Sequence[Batch], most: int = 10, memory: int = 1 << 29
) -> Attending:
    """What makes `head` of an attention layer look where it does, on the rows of `batches`.

    Raises ValueError where the layer has no such head or its scores are no sum over pairs (`attention_scores`).
    """
    host = subject.host
    module = subject.stand_ins.get(site.name, host.module(site.module))
    layer, through, nodes = attention_scores(host.model, module), norm(host.model, site.norm), index(host, subject.basis)
    if head >= len(layer.query):
        raise ValueError(f"L{site.layer}.H{head}: layer {site.layer} has H0 to H{len(layer.query) - 1}; name one of these")
    group = head * len(layer.key) // len(layer.query)
    sides = ((layer.query, layer.query_bias, layer.query_norm, head), (layer.key, layer.key_bias, layer.key_norm, group))
    query, key = (_side(through, weight[at], or_zeros(bias, weight)[at], inner) for weight, bias, inner, at in sides)
    tokens = torch.cat([batch.ids[batch.real] for batch in batches]).unique()
    source = sources(host, subject.basis, nodes, site.reads_at, tokens)
    names = [*(nodes.name(int(number)) for number in source.numbers), CONSTANT]
    step = max(1, memory // (12 * len(names)))
    asking, answering, places = _Sums(len(names), 1), _Sums(1, len(names)), torch.zeros(4)
    blocks = [(start, _Sums(min(step, len(names) - start), len(names))) for start in range(0, len(names), step)]
    for start, pairs in blocks:
        for batch in batches:
            seen = see(host, subject.basis, nodes, site.reads_at, tokens, batch, subject.trace(batch.ids))
            there = seen.trace.sites[site.name]
            assert there.pattern is not None
            for row, length in enumerate(batch.real.sum(1).tolist()):
                pattern = there.pattern[row, head, :length, :length]
                excess = layer.scale * (pattern - (pattern > 0) / (pattern > 0).sum(1, keepdim=True))
                asks, answers = (side.parts(source, seen, there, row, length, layer.rotates) for side in (query, key))
                pairs.add(_gains(asks[start : start + step], excess, answers), length)
                if start == 0:
                    asking.add(_gains(asks, excess, answers.sum(0, keepdim=True)), length)
                    answering.add(_gains(asks.sum(0, keepdim=True), excess, answers), length)
                    places += torch.stack([pattern[:, 0].sum(), pattern.diagonal().sum(), pattern.diagonal(-1).sum(), torch.tensor(float(length))])
    return _report(f"L{site.layer}.H{head}", names, blocks, asking, answering, (places[:3] / places[3]).tolist(), int(places[3]), most)


def _gains(
    asks: Float[Tensor, "target token inside"], excess: Float[Tensor, "token token"], answers: Float[Tensor, "source token inside"]
) -> Float[Tensor, "target source"]:
    """Gains of all pairs, summed over a row's tokens; most nodes are silent in one row and cost nothing."""
    on, to = (side.flatten(1).any(1) for side in (asks, answers))
    weighted = torch.einsum("ij,njd->nid", excess, answers[to])
    gain = torch.zeros(len(asks), len(answers))
    gain[torch.where(on)[0][:, None], torch.where(to)[0]] = asks[on].flatten(1) @ weighted.flatten(1).T
    return gain


class _Sums:
    """Sums over rows of text for means with standard errors (ratio estimator)."""

    def __init__(self, targets: int, count: int) -> None:
        self.total, self.square, self.cross = (torch.zeros(targets, count) for _ in range(3))
        self.count = self.count_square = 0.0

    def add(self, value: Float[Tensor, "target source"], count: int) -> None:
        """One row's sums over its tokens."""
        self.total += value
        self.square += value.square()
        self.cross += value * count
        self.count += count
        self.count_square += count**2

    def mean(self) -> Float[Tensor, "target source"]:
        """A token's mean."""
        return self.total / self.count

    def error(self) -> Float[Tensor, "target source"]:
        """Standard errors of the means."""
        return ratio_error(self.mean(), self.square, self.cross, self.count, self.count_square)


def _report(
    head: str, names: list[str], blocks: list[tuple[int, _Sums]], asking: _Sums, answering: _Sums, places: list[float], tokens: int, most: int
) -> Attending:
    """The largest of everything."""
    def largest(sums: _Sums, asks: Sequence[str], answers: Sequence[str], whole: float) -> list[Pair]:
        mean, error = sums.mean().flatten(), sums.error().flatten()
        best = mean.abs().topk(min(most, len(mean))).indices.tolist()
        return [Pair(asks[at // len(answers)], answers[at % len(answers)], float(mean[at]), float(error[at]),
                     abs(float(mean[at])) / max(whole, 1e-12)) for at in best]

    def size(sums: _Sums) -> float:
        return float(sums.mean().abs().sum())

    whole = sum(size(pairs) for _, pairs in blocks)
    found = [pair for start, pairs in blocks for pair in largest(pairs, names[start:], names, whole)]
    asks, answers = largest(asking, names, [ANY], size(asking)), largest(answering, [ANY], names, size(answering))
    found = sorted((one for one in found if one.gain != 0), key=lambda one: -abs(one.gain))[:most]
    first, same, previous = places
    return Attending(head, tuple(found), tuple(asks), tuple(answers), float(asking.mean().sum()), first, same, previous, tokens)
