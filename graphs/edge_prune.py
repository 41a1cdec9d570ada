"""Which edges to keep: scores on clean tokens, learned gates, the means that cut edges are held at, healing of what is kept.

With c_e(i) = V_e a_s(i) / scale(i) what edge e carries at token i, and g_t the gradient of the loss on completions with respect to the
target's drive, an edge is worth

    flow         mean |c_e| over tokens, as a share of all that its target reads
    magnitude    |V_e|, as a share of the same: no data
    fisher       mean over rows of (sum_i g_t(i) (c_e(i) - mean c_e))^2: a diagonal Fisher estimate of what cutting it to its mean costs
                 (edge attribution patching, Syed et al. 2023, with the square of each row's sum in the place of its size; cf.
                 `graphs.scores`)
    random       a control
    gates        a hard-concrete gate an edge, learned by KL to the model from the order of fisher on, while the circuit's weights adapt
                 (as gates of nodes are: `graphs.prune`); a quadratic penalty draws the expected share of open gates to the target

A row's sum is one product of (targets x tokens) with (tokens x sources), times V: no contribution is ever stored.

What is counted: pairs with V != 0 whose source may be active on the clean rows. Edges from vocabulary entries that these never hold, and
into such entries' logits, are neither counted nor cut: nothing that is seen says what they are worth. `share` of the others is kept, the
best of all targets together. A token counts as a source for each vocabulary entry, an output bias as one.

`thin` cuts at once, or, where it may heal, in `STAGES` of falling shares: after each, the circuit's own weights (from which every edge's is
made) are trained by KL to the model on clean rows with the cut edges held out, and the next is scored anew (gradual pruning: Zhu and
Gupta 2017). An edge that was cut may come back. All this looks at completions alone: what predicts the prompt's own tokens is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.batches import Batch
from graphs.edge_run import LOGITS, EdgeModel, Edges
from graphs.fit import distill
from graphs.losses import divergence
from graphs.prune import Gates
from graphs.shares import share as shared
from graphs.targets import Targets
from graphs.train import TrainConfig, train

GATES = "gates"
"""The score that is learned."""
STAGES = 5
"""Shares that are stepped through while healing, from `FIRST` down."""
FIRST = 0.5
BATCHES = 8
"""Batches of clean rows that scores and means are taken on."""
HEAL_RATE, GATE_RATE, DRAW = 2.5e-3, 0.15, 20.0
"""Learning rates of weights and of gates, and the weight of the gates' penalty."""
Scores = Mapping[str, Float[Tensor, "_target _source"]]


@torch.no_grad()
def totals(run: EdgeModel, batches: Sequence[Batch], size: bool) -> dict[str, Float[Tensor, "_source"]]:
    """Sums of a / scale (of its size) over clean tokens, for the sources of each reader, as the run is now."""
    run.fix()
    sums = {name: torch.zeros_like(reader.mean) for name, reader in run.readers.items()}
    for batch in batches:
        run(batch.ids)
        for name, reader in run.readers.items():
            scale, active = run.stream.inverse[reader.path] * batch.real, run.stream.active[: reader.sites]
            tokens = scale.new_zeros(run.vocabulary).index_add(0, batch.ids.flatten(), scale.flatten())
            sums[name] += torch.cat([tokens, *(scale.flatten() @ (one.abs() if size else one).flatten(0, 1) for one in active)])
    run.thaw()
    return sums


def set_means(run: EdgeModel, batches: Sequence[Batch]) -> None:
    """Measure what cut edges are held at: the mean over clean tokens, as the run is now."""
    count = sum(int(batch.real.sum()) for batch in batches)
    for name, total in totals(run, batches, False).items():
        run.readers[name].mean.copy_(total / count)


@torch.no_grad()
def magnitude(run: EdgeModel, _batches: Sequence[Batch], _seed: int) -> Scores:
    """See the module."""
    return {name: _shares(reader.virtual()[0].abs()) for name, reader in run.readers.items()}


@torch.no_grad()
def flow(run: EdgeModel, batches: Sequence[Batch], _seed: int) -> Scores:
    """See the module."""
    sizes = totals(run, batches, True)
    return {name: _shares(reader.virtual()[0].abs() * sizes[name]) for name, reader in run.readers.items()}


def fisher(run: EdgeModel, batches: Sequence[Batch], _seed: int) -> Scores:
    """See the module."""
    found = {name: torch.zeros(reader.kept.shape) for name, reader in run.readers.items()}
    for batch in batches:
        for name, gradient in _gradients(run, batch).items():
            reader, stream = run.readers[name], run.stream
            scaled = gradient * stream.inverse[reader.path].detach()[..., None]
            active = torch.cat([gradient.new_zeros(*batch.ids.shape, 0), *(one.detach() for one in stream.active[: reader.sites])], -1)
            for ids, by, one, raw in zip(batch.ids, scaled, active, gradient, strict=True):  # a row at a time: squares are of a row's sum
                tokens = by.new_zeros(run.vocabulary, by.shape[1]).index_add(0, ids, by).T
                found[name] += (torch.cat([tokens, by.T @ one], 1) - raw.sum(0)[:, None] * reader.mean).square()
    run.thaw()
    with torch.no_grad():
        return {name: found[name] * reader.virtual()[0].square() for name, reader in run.readers.items()}


def random(run: EdgeModel, _batches: Sequence[Batch], seed: int) -> Scores:
    """See the module."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(reader.kept.shape, generator=generator) for name, reader in run.readers.items()}


SCORES: dict[str, Callable[[EdgeModel, Sequence[Batch], int], Scores]] = {"flow": flow, "magnitude": magnitude, "fisher": fisher, "random": random}


def _shares(size: Float[Tensor, "target source"]) -> Float[Tensor, "target source"]:
    return size / size.sum(1, keepdim=True).clamp_min(1e-12)


def _gradients(run: EdgeModel, batch: Batch) -> dict[str, Float[Tensor, "row token target"]]:
    """Of the summed next-token loss on completions, with respect to every drive; zero at pads, which reach no loss."""
    try:
        for reader in run.readers.values():
            reader.watch = True
        with torch.enable_grad():
            labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
            loss = nn.functional.cross_entropy(run(batch.ids)[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            drives = [reader.last for reader in run.readers.values()]
            return dict(zip(run.readers, torch.autograd.grad(loss, drives), strict=True))  # type: ignore[arg-type]
    finally:
        for reader in run.readers.values():
            reader.watch, reader.last = False, None


@torch.no_grad()
def counted(run: EdgeModel, seen: Int[Tensor, "token"]) -> Edges:
    """Which pairs are edges. seen: vocabulary entries that the clean rows hold."""
    unseen = torch.ones(run.vocabulary, dtype=torch.bool)
    unseen[seen] = False
    out = {}
    for name, reader in run.readers.items():
        edges = reader.virtual()[0] != 0
        edges[:, : run.vocabulary] &= ~unseen
        if name == LOGITS:
            edges[unseen] = False
        out[name] = edges
    return out


def best(scores: Scores, edges: Edges, share: float) -> Edges:
    """What to keep: the best `share` of the edges, all targets together, and whatever is not counted. Raises ValueError outside 0 to 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"--edges {share:g}: give a share from 0 to 1")
    flat = torch.cat([scores[name][mask] for name, mask in edges.items()])
    open_ = torch.zeros(len(flat), dtype=torch.bool)
    open_[flat.topk(round(share * len(flat))).indices] = True
    parts = open_.split([int(mask.sum()) for mask in edges.values()])
    return {name: (~mask).masked_scatter(mask, part) for (name, mask), part in zip(edges.items(), parts, strict=True)}


@dataclass(frozen=True)
class ThinConfig:
    """share: of the edges; steps: batches of training, 0 to cut at once; first: offset of the batches."""

    share: float
    score: str = "fisher"
    steps: int = 0
    first: int = 0
    seed: int = 0


def thin(run: EdgeModel, targets: Targets, edges: Edges, config: ThinConfig) -> list[float]:
    """Cut the run to a share of its edges, healing it where steps are given; returns the loss of every step.

    Raises ValueError for gates without steps, and as `best` does.
    """
    if config.score == GATES and not config.steps:
        raise ValueError("--edge-score gates: gates are learned; give --edge-steps (120, say)")
    batches, losses, plan = [targets.batches(step) for step in range(BATCHES)], [], stages(config)
    for share, steps in plan:
        set_means(run, batches)
        if config.score == GATES:
            scores, lost = learn_gates(run, targets, edges, fisher(run, batches, config.seed), share, steps, config.first, config.seed)
            losses += lost
            set_means(run, batches)
        else:
            scores = SCORES[config.score](run, batches, config.seed)
        run.keep(best(scores, edges, share))
        losses += distill(targets, run, steps, HEAL_RATE, 0.0, f"edges {share:.2f}", first=config.first + len(losses), sure=1.0)
        run.thaw()
    return losses


def stages(config: ThinConfig) -> list[tuple[float, int]]:
    """Shares and their batches of training: the last gets twice as many as each before it. Gates need one stage, half of it for learning."""
    if not config.steps or config.share >= FIRST:
        return [(config.share, config.steps // (2 if config.score == GATES else 1))]
    if config.score == GATES:
        return [(config.share, config.steps // 2)]
    each = config.steps // (STAGES + 1)
    falling = [FIRST * (config.share / FIRST) ** (at / (STAGES - 1)) for at in range(STAGES)]
    return [(share, each) for share in falling[:-1]] + [(config.share, config.steps - each * (STAGES - 1))]


def learn_gates(
    run: EdgeModel, targets: Targets, edges: Edges, warm: Scores, share: float, steps: int, first: int, seed: int
) -> tuple[Scores, list[float]]:
    """Gate logits of every edge, and the losses; the run's weights are trained along."""
    order = torch.cat([warm[name][mask] for name, mask in edges.items()]).argsort().argsort()
    ranks = (1 + 4 * order / max(1, len(order) - 1)).split([int(mask.sum()) for mask in edges.values()])
    gates = Gates({name: rank for name, rank in zip(edges, ranks, strict=True)}, seed)
    both, count = nn.ModuleDict({"run": run, "gates": gates}), len(order)
    sizes = torch.tensor([len(rank) / count for rank in ranks])

    def loss(step: int) -> Tensor:
        batch = shared(targets.batches(first + step))
        goal = 1 - (1 - share) * min(1.0, step / (0.6 * max(1, steps)))
        for name, gate in gates.sample(step).items():
            run.readers[name].gate = (~edges[name]).to(gate.dtype).masked_scatter(edges[name], gate)
        run.thaw()
        kl = divergence(run(batch.ids), targets(batch), batch, 0.0)
        return kl + DRAW * ((gates.open_share() * sizes).sum() - goal).square()

    try:
        losses = train(both, loss, TrainConfig(steps, HEAL_RATE), "edge gates", rates={"gates.": GATE_RATE / HEAL_RATE})
    finally:
        for reader in run.readers.values():
            reader.gate = None
        run.thaw()
    logits = zip(edges, gates.logits, strict=True)
    return {name: torch.zeros(edges[name].shape).masked_scatter(edges[name], logit.detach()) for name, logit in logits}, losses
