"""Flow: what every edge carries on a task's clean tokens, in one or more passes that stay inside a memory budget.

For target t with weight w (1 where it is active, else 0) and source s, over tokens i of clean text and with the notation of `graphs.edges`

    flow         sum_i w(i) c(i) / sum_i w(i)               standard error: ratio estimator over clusters of rows
    share        sum_i |c(i)| / sum_s sum_i |c(i)|
    coefficient  sum_i w |c| / sum_i w |a_s|                its spread: the same average of squared deviations
    frequency    sum_i w [a_s != 0] / sum_i w

A contribution is V[t, s] times what is free of t, or routed by the target's head, so each statistic is a matrix product of
(tokens x targets) with (tokens x sources): no contribution is ever stored. Errors have a vector of their own at each token.
A pass over the tokens takes as many targets as have accumulators in `memory` bytes; each batch is run once a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from graphs.architectures import Site, architecture, norm
from graphs.batches import Batch
from graphs.edges import Basis, Reconstruction, activations, errors, factors, routed, unembedding
from graphs.graph import Block, FeatureGraph, Index, index
from graphs.host import Host
from graphs.trace import Trace

FORMAT = 3
"""Raised when what `build` stores changes its meaning: edges of an older format are built anew."""
MATRICES = 9
"""Target-by-source matrices that a block holds at once, with room to work."""


@dataclass(frozen=True)
class Sources:
    """Everything a target may read, in the graph's order. numbers: node numbers; writes: vectors (zeros for errors)."""

    numbers: Int[Tensor, "source"]
    writes: Float[Tensor, "source d"]
    error: Bool[Tensor, "source"]


@dataclass(frozen=True)
class Seen:
    """One batch as sources see it: activations, and what errors wrote. real: tokens that are no pads."""

    activations: Float[Tensor, "row token source"]
    errors: Float[Tensor, "error row token d"]
    trace: Trace
    real: Bool[Tensor, "row token"]


def sources(host: Host, basis: Basis, nodes: Index, depth: int, tokens: Int[Tensor, "token"]) -> Sources:
    """Sources that write at or before `depth`; tokens: vocabulary entries that occur."""
    numbers, vectors, error = [tokens], [host.model.get_input_embeddings()(tokens).detach()], [torch.zeros(len(tokens), dtype=torch.bool)]
    places = nodes.by_name["position"]
    if places.count:
        numbers.append(places.start + torch.arange(places.count))
        table = host.module(architecture(host.model).positions or "").weight
        vectors.append(table.detach()[-places.count :])  # type: ignore[operator, index]
        error.append(torch.zeros(places.count, dtype=torch.bool))
    for site in _writers(host, depth):
        part = basis[site.name]
        for suffix, written in (("", part.writes), (".bias", part.constant[None]), (".error", torch.zeros_like(part.constant)[None])):
            block = nodes.by_name[site.name + suffix]
            numbers.append(block.start + torch.arange(block.count))
            vectors.append(written)
            error.append(torch.full((block.count,), suffix == ".error"))
    return Sources(torch.cat(numbers), torch.cat(vectors), torch.cat(error))


def _writers(host: Host, depth: int) -> list[Site]:
    return sorted((site for site in host.sites if site.writes_at <= depth), key=lambda site: site.writes_at)


def see(host: Host, basis: Basis, nodes: Index, depth: int, tokens: Int[Tensor, "token"], batch: Batch, found: Trace) -> Seen:
    """The batch's activations in the order of `sources`; those of a smaller depth are the first of them."""
    place = torch.zeros(host.config.vocab_size, dtype=torch.long)
    place[tokens] = torch.arange(len(tokens))
    columns = [torch.nn.functional.one_hot(place[batch.ids], len(tokens)).float()]
    if count := nodes.by_name["position"].count:
        columns.append(torch.eye(batch.ids.shape[1], count).expand(len(batch.ids), -1, -1))
    missing, one = [], torch.ones(*batch.ids.shape, 1)
    for site in _writers(host, depth):
        part, there = basis[site.name], found.sites[site.name]
        active = activations(part, there)
        columns += [active, one, one]
        missing.append(errors(part, there, active))
    gone = torch.stack(missing) if missing else torch.zeros(0, *found.token.shape)
    return Seen(torch.cat(columns, -1), gone, found, batch.real)


@dataclass
class Sums:
    """Accumulators of one block of targets: over tokens, and over clusters of rows."""

    flow: Float[Tensor, "target source"]
    absolute: Float[Tensor, "target source"]
    activity: Float[Tensor, "target source"]
    square: Float[Tensor, "target source"]
    often: Float[Tensor, "target source"]
    flow_square: Float[Tensor, "target source"]
    flow_count: Float[Tensor, "target source"]
    count: Float[Tensor, "target"]
    count_square: Float[Tensor, "target"]
    mean: Float[Tensor, "target"]

    @staticmethod
    def empty(targets: int, count: int) -> Sums:
        """Zeros."""
        matrices = (torch.zeros(targets, count) for _ in range(7))
        return Sums(*matrices, *(torch.zeros(targets) for _ in range(3)))

    def add(self, flow: Tensor, absolute: Tensor, activity: Tensor, square: Tensor, often: Tensor, count: Tensor, mean: Tensor) -> None:
        """One cluster's sums."""
        for name, value in (("flow", flow), ("absolute", absolute), ("activity", activity), ("square", square), ("often", often), ("mean", mean),
                            ("count", count)):
            getattr(self, name).add_(value)
        self.flow_square.add_(flow.square())
        self.flow_count.add_(flow * count[:, None])
        self.count_square.add_(count.square())


@dataclass(frozen=True)
class Targets:
    """A block of targets that read alike: `site` None means logits. nodes: numbers inside their block of the graph."""

    block: Block
    site: Site | None
    nodes: Int[Tensor, "target"]
    pulled: Float[Tensor, "target d"]
    constant: Float[Tensor, "target"]
    weights: Float[Tensor, "target source"]


@dataclass(frozen=True)
class Weights:
    """How a block of targets weighs each source token, zero at pads. signed: what times V a_s gives the flow; absolute: the same
    without signs; plain: w (routed); square: w (routed) times the squared factors between V a_s and a contribution."""

    signed: Float[Tensor, "row token target"]
    absolute: Float[Tensor, "row token target"]
    plain: Float[Tensor, "row token target"]
    square: Float[Tensor, "row token target"]


def target_weight(basis: Basis, targets: Targets, seen: Seen) -> tuple[Float[Tensor, "row token target"], Float[Tensor, "row token target"]]:
    """(w, the factor of the drive that is the target's own) at the target's tokens; a logit's w marks where it is the model's choice."""
    real = seen.real[..., None]
    if targets.site is None:
        w = ((seen.trace.logits.argmax(-1)[..., None] == targets.nodes) & real).float()
        return w, torch.ones_like(w)
    part, found = basis[targets.site.name], seen.trace.sites[targets.site.name]
    return ((activations(part, found)[..., targets.nodes] != 0) & real).float(), factors(part, found, targets.nodes)


def source_weights(basis: Basis, targets: Targets, seen: Seen, w: Tensor, factor: Tensor) -> Weights:
    """Weights at the source's tokens: where the target stands, or wherever its head looks."""
    out, inverse = [w * factor, w * factor.abs(), w, w * factor.square()], seen.trace.inverse[..., None]
    if targets.site is not None:
        part, found = basis[targets.site.name], seen.trace.sites[targets.site.name]
        out, inverse = [routed(part, found, targets.nodes, one) for one in out], found.inverse[..., None]
    signed, absolute, plain, square = out
    return Weights(signed * inverse, absolute * inverse, plain, square * inverse.square())


def accumulate(basis: Basis, targets: Targets, source: Sources, seen: Seen, sums: Sums) -> None:
    """Add one batch, as one cluster, to the sums of a block."""
    w, factor = target_weight(basis, targets, seen)
    weights = source_weights(basis, targets, seen, w, factor)
    signed, absolute, plain, square = (one[seen.real].T for one in (weights.signed, weights.absolute, weights.plain, weights.square))
    a, v = seen.activations[seen.real][:, : len(source.numbers)], targets.weights
    flow, size = v * (signed @ a), v.abs() * (absolute @ a.abs())
    if len(missing := torch.where(source.error)[0]):
        error = seen.errors[: len(missing), seen.real] @ targets.pulled.T  # "error token target"
        flow[:, missing] = (signed.T * error).sum(1).T
        size[:, missing] = (absolute.T * error.abs()).sum(1).T
    part = None if targets.site is None else basis[targets.site.name]
    value = seen.trace.logits if part is None else activations(part, seen.trace.sites[targets.site.name])  # type: ignore[union-attr]
    sums.add(flow, size, plain @ a.abs(), v.square() * (square @ a.abs()), plain @ (a != 0).float(), w[seen.real].sum(0),
             value[..., targets.nodes][seen.real].sum(0))


def ratio_error(mean: Tensor, square: Tensor, cross: Tensor, count: Tensor | float, count_square: Tensor | float) -> Tensor:
    """Standard error of a mean over tokens that come in clusters (ratio estimator: Cochran 1977, section 6.4).

    square: sum over clusters of squared sums; cross: of sums times counts; count and count_square: of counts and their squares.
    """
    return (square - 2 * mean * cross + mean.square() * count_square).clamp_min(0).sqrt() / count


def finish(targets: Targets, source: Sources, sums: Sums, enough: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Edges until `enough` of the absolute drive is carried (sorted by target and share), and the targets' own numbers."""
    count = sums.count.clamp_min(1)[:, None]
    share = sums.absolute / sums.absolute.sum(1, keepdim=True).clamp_min(1e-12)
    ordered = share.sort(1, descending=True)
    before = ordered.values.cumsum(1) - ordered.values
    kept = (before < enough) & (ordered.values > 0)
    target, rank = torch.where(kept)
    column = ordered.indices[target, rank]
    at = (target, column)
    flow = sums.flow / count
    activity = sums.activity.clamp_min(1e-12)
    coefficient = targets.weights.sign() * sums.absolute / activity
    variance = (sums.square / activity - coefficient.square()).clamp_min(0)
    virtual = targets.weights.masked_fill(source.error, float("nan"))
    coefficient, variance = (one.masked_fill(source.error, float("nan")) for one in (coefficient, variance))
    error = ratio_error(flow, sums.flow_square, sums.flow_count, count, sums.count_square[:, None])
    edges = {"src": source.numbers[column], "dst": targets.block.start + targets.nodes[target], "weight": virtual[at], "flow": flow[at],
             "flow_error": error[at], "coefficient": coefficient[at], "spread": variance.sqrt()[at],
             "share": share[at], "frequency": (sums.often / count)[at]}
    own = {"constant": targets.constant, "active": sums.count, "mean": sums.mean, "drive": flow.sum(1),
           "explained": torch.zeros(len(targets.nodes)).index_add(0, target, share[at]), "parents": (share > 0).sum(1)}
    return edges, own


def readers(host: Host, basis: Basis, nodes: Index, chosen: Int[Tensor, "token"]) -> list[tuple[Block, Site | None, Tensor, Tensor, Tensor]]:
    """Every possible target by block: (block, site, node numbers inside it, pulled read vectors, constants). chosen: logits."""
    found: list[tuple[Block, Site | None, Tensor, Tensor, Tensor]] = []
    for site in sorted(host.sites, key=lambda site: site.writes_at):
        part, through = basis[site.name], norm(host.model, site.norm)
        constant = part.biases + part.reads @ through.offset
        found.append((nodes.by_name[site.name], site, torch.arange(part.count), through.pulled(part.reads), constant))
    head, (through, centred) = host.model.get_output_embeddings(), unembedding(host)
    bias = torch.zeros(len(centred)) if head.bias is None else head.bias.detach() - head.bias.detach().mean()
    found.append((nodes.by_name["logit"], None, chosen, through.pulled(centred[chosen]), bias[chosen] + centred[chosen] @ through.offset))
    return found


@torch.no_grad()
def build(
    subject: Reconstruction, batches: Sequence[Batch], enough: float = 0.95, memory: int = 1 << 30, only: Iterable[str] | None = None
) -> FeatureGraph:
    """The graph of `subject` on the tokens of `batches`, each a cluster of rows.

    enough: share of each target's absolute drive that its stored parents carry; memory: bytes for accumulators; only: names
    of the target blocks (all by default). Raises ValueError where `memory` holds no target.
    """
    host, basis = subject.host, subject.basis
    nodes = index(host, basis)
    tokens = torch.cat([batch.ids[batch.real] for batch in batches]).unique()
    chosen = torch.cat([host.model(input_ids=batch.ids).logits.argmax(-1)[batch.real] for batch in batches]).unique()
    edges: dict[str, list[Tensor]] = {}
    own = {name: torch.zeros(nodes.count) for name in ("constant", "active", "mean", "drive", "explained", "parents")}
    sampled = sum(int(batch.real.sum()) for batch in batches)
    plan: list[list[tuple[Targets, Sources]]] = [[]]
    left, deepest = memory, 2 * host.config.num_hidden_layers
    for block, site, numbers, pulled, constant in readers(host, basis, nodes, chosen):
        if only is not None and block.name not in only:
            continue
        source = sources(host, basis, nodes, block.depth, tokens)
        one = MATRICES * 4 * len(source.numbers)
        if one > memory:
            raise ValueError(f"--memory {memory >> 20}: one target of {block.name} needs {one / 2**20:.1f} MB; give more")
        start = 0
        while start < len(numbers):
            if left < one:
                plan.append([])
                left = memory
            part = slice(start, start + left // one)
            plan[-1].append((Targets(block, site, numbers[part], pulled[part], constant[part], pulled[part] @ source.writes.T), source))
            start, left = part.stop, left - len(numbers[part]) * one
    bar = tqdm(total=len(plan) * len(batches), desc="graph", mininterval=1.0, leave=False)
    for group in plan:
        sums = [Sums.empty(len(targets.nodes), len(source.numbers)) for targets, source in group]
        for batch in batches:
            seen = see(host, basis, nodes, deepest, tokens, batch, subject.trace(batch.ids))
            for (targets, source), one_sum in zip(group, sums, strict=True):
                accumulate(basis, targets, source, seen, one_sum)
            bar.update()
        for (targets, source), one_sum in zip(group, sums, strict=True):
            found, mine = finish(targets, source, one_sum, enough)
            for name, value in found.items():
                edges.setdefault(name, []).append(value)
            for name, value in mine.items():
                own[name][targets.block.start + targets.nodes] = value.float()
    bar.close()
    _activity_of_inputs(nodes, batches, own)
    own["active"], own["mean"] = own["active"] / sampled, own["mean"] / sampled
    own["parents"] = own["parents"].long()
    return FeatureGraph(nodes, **{name: torch.cat(values) for name, values in edges.items()}, **own, tokens=sampled)


def _activity_of_inputs(nodes: Index, batches: Sequence[Batch], own: dict[str, Tensor]) -> None:
    """How often each token occurs."""
    for batch in batches:
        counts = torch.bincount(batch.ids[batch.real], minlength=nodes.by_name["token"].count).float()
        own["active"][: len(counts)] += counts
        own["mean"][: len(counts)] += counts
