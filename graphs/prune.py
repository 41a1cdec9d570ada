"""Prune: which features and attention groups a task needs, from learned gates to a nested family of circuits.

1. *Scores* (`graphs.scores`) warm-start the gates, or rank the nodes by themselves where no gate is trained (steps 0).
2. *Gates*: a hard-concrete gate a node (Louizos et al. 2018, eq. 11-13) is trained by KL to the host over all positions,
   while the parts adapt; a quadratic penalty draws each site's expected share of open gates to the target.
3. *Order*: at each site the nodes are ranked by their gate. A circuit of size s keeps the best s of every site: the
   same width in every layer, because one config has one width and the widest layer is what gets stored. Head counts
   step through those that the compiled class allows. The family is nested, so one number is enough to bisect. A
   budget is spent on the pair of head and feature counts that uses it and keeps their shares closest.

Which member to keep is for the caller to find, by what a healed member scores on the `tune` split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.attention import relabelled
from graphs.losses import SURE, divergence
from graphs.replace import LAYERS, Replacement
from graphs.scores import SCORES
from graphs.shares import share
from graphs.targets import Targets
from graphs.train import TrainConfig, train

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2.0 / 3.0
"""Stretch and temperature of the hard-concrete distribution (Louizos et al. 2018, section 4)."""
STEP = 16
"""Feature counts are multiples of this."""


@dataclass(frozen=True)
class PruneConfig:
    """score: what warm-starts the gates; target: share of nodes that the gates are drawn to; draw: weight of that penalty; components:
    attention's nodes are the components of its heads instead of the heads; score_batches: batches that scores are taken on."""

    score: str = "fisher"
    steps: int = 120
    target: float = 0.66
    draw: float = 20.0
    gate_rate: float = 0.15
    learning_rate: float = 1e-3
    prompt_weight: float = 0.1
    score_batches: int = 12
    components: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Size:
    """One member of the nested family. share: of the features of a layer, or, where layers fall, of all heads; heads, features: in each
    layer; components: how many of attention's a layer keeps among those of its kept heads, or None where all of them stay; per:
    components a KV group has; layers: how many stay, or None where whole layers are no nodes."""

    share: float
    heads: int
    features: int
    components: int | None = None
    per: int = 1
    layers: int | None = None

    @property
    def key(self) -> str:
        """What tells it from the others of its family, as part of a file's name."""
        return str(self.features) if self.layers is None else f"{self.layers}x{self.heads}"

    def within(self, other: Size) -> bool:
        """Whether a circuit of this size fits inside one of the other."""
        return self.heads <= other.heads and self.features <= other.features and (self.layers or 0) <= (other.layers or 0)

    def __str__(self) -> str:
        if self.layers is not None:
            return f"{self.layers} layers of {self.heads} heads"
        return f"{self.heads} heads, {self.features} features" + ("" if self.components is None else f", {self.components} components")


class Gates(nn.Module):
    """Hard-concrete gates by site."""

    def __init__(self, start: dict[str, Tensor], seed: int) -> None:
        super().__init__()
        self.names = list(start)
        self.logits = nn.ParameterList([nn.Parameter(value.clone()) for value in start.values()])
        self.seed = seed

    def sample(self, step: int) -> dict[str, Float[Tensor, "_node"]]:
        """One draw; a function of (seed, step), so a resumed run draws the same."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        out = {}
        for name, logit in zip(self.names, self.logits, strict=True):
            u = torch.rand(logit.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            soft = torch.sigmoid((u.log() - (1 - u).log() + logit) / TEMPERATURE)
            out[name] = (soft * (HIGH - LOW) + LOW).clamp(0, 1)
        return out

    def open_share(self) -> Float[Tensor, "site"]:
        """Expected share of gates that are not exactly 0, by site."""
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        return torch.stack([torch.sigmoid(logit - shift).mean() for logit in self.logits])


def _warm(score: Tensor) -> Tensor:
    """Gate logits from scores: by rank, from 1 (least) to 5 (most), so that nearly all gates start open."""
    rank = score.argsort().argsort().float()
    return 1 + 4 * rank / max(1, len(score) - 1)


def learn_gates(
    targets: Targets, replacement: Replacement, config: PruneConfig, state: Path | None = None, first: int = 0
) -> tuple[dict[str, Float[Tensor, "_node"]], list[float]]:
    """Gate logits by site, and the losses. The replacement's parts are trained along with the gates."""
    found = SCORES[config.score](replacement, targets.batches, config.score_batches, config.components, config.seed)
    gates = Gates({name: _warm(score) for name, score in found.items()}, config.seed)
    both = nn.ModuleDict({"replacement": replacement, "gates": gates})

    def loss(step: int) -> Tensor:
        batch = share(targets.batches(first + step))
        goal = 1 - (1 - config.target) * min(1.0, step / (0.6 * max(1, config.steps)))
        with replacement.gated(gates.sample(step)):
            kl = divergence(replacement(batch.ids), targets(batch), batch, config.prompt_weight, SURE)
        return kl + config.draw * (gates.open_share() - goal).square().mean()

    rates = {"gates.": config.gate_rate / config.learning_rate}
    losses = train(both, loss, TrainConfig(config.steps, config.learning_rate), "gates", state, rates=rates)
    return dict(zip(gates.names, [logit.detach() for logit in gates.logits], strict=True)), losses


def family(replacement: Replacement, legal_heads: tuple[int, ...], components: bool = False) -> list[Size]:
    """The nested sizes, largest first: every feature count with the fewest legal groups of the same share or more; where whole layers are
    nodes, from all layers and groups down to one layer of the fewest groups."""
    if replacement.layers is not None:
        return _falling(replacement, legal_heads)
    width, heads = _widest(replacement)
    fewest = [min((h for h in legal_heads if h >= features / width * heads - 1e-9), default=heads) for features in range(width, 0, -STEP)]
    return [_size(replacement, h, features, components) for h, features in zip(fewest, range(width, 0, -STEP), strict=True)]


def columns(replacement: Replacement, legal_heads: tuple[int, ...], components: bool = False) -> list[list[Size]]:
    """All sizes that a budget may buy: for each legal group count those of every feature count, largest first. Where whole layers are
    nodes, the family is all there is."""
    if replacement.layers is not None:
        return [_falling(replacement, legal_heads)]
    width, _ = _widest(replacement)
    return [[_size(replacement, h, features, components) for features in range(width, 0, -STEP)] for h in legal_heads]


def uneven(size: Size, replacement: Replacement) -> float:
    """How far the shares of heads and of features are apart, as |log ratio|."""
    return 0.0 if size.layers is not None else abs(math.log(size.heads / _widest(replacement)[1] / size.share))


def _widest(replacement: Replacement) -> tuple[int, int]:
    """The most features and the most groups that a layer has."""
    counts = replacement.node_counts()
    return tuple(max(count for name, count in counts.items() if name.endswith(kind)) for kind in ("mlp", "attention"))  # type: ignore[return-value]


def _size(replacement: Replacement, heads: int, features: int, components: bool) -> Size:
    width, most_heads = _widest(replacement)
    if not components:
        return Size(features / width, heads, features)
    most = max(count for name, count in replacement.node_counts(True).items() if name.endswith("attention"))
    return Size(features / width, heads, features, math.ceil(features / width * most), most // most_heads)


def _falling(replacement: Replacement, legal_heads: tuple[int, ...]) -> list[Size]:
    """From the whole down, in the smallest steps there are: the shares of layers and of heads a layer fall in turn, the larger first."""
    layers, heads = len(replacement.node_counts()) - 1, max(count for name, count in replacement.node_counts().items() if name != LAYERS)
    width = max(part.features for part in replacement.transcoders().values())
    fewer = sorted(count for count in legal_heads if count < heads)
    left, wide, sizes = layers, heads, [Size(1.0, heads, width, layers=layers)]
    while fewer or left > 1:
        if fewer and (left == 1 or wide * layers >= left * heads):
            wide = fewer.pop()
        else:
            left -= 1
        sizes.append(Size(left * wide / (layers * heads), wide, width, layers=left))
    return sizes


def within(order: Mapping[str, Float[Tensor, "_node"]], kept: Mapping[str, Int[Tensor, "_kept"]]) -> dict[str, Float[Tensor, "_node"]]:
    """The order with all nodes but the kept ones shut, so that what is kept next is a subset."""
    return {name: torch.full_like(logit, -torch.inf).index_copy(0, kept[name], logit[kept[name]]) for name, logit in order.items()}


def kept_nodes(order: Mapping[str, Float[Tensor, "_node"]], size: Size) -> dict[str, Int[Tensor, "_kept"]]:
    """The best nodes of every site at `size`, in their original order. The best components stand in the heads whose components
    are open most, together: a head is stored whole. A dropped layer keeps no head."""
    kept = {} if size.layers is None else {LAYERS: order[LAYERS].topk(size.layers).indices.sort().values}
    alive = {f"L{layer}.attention" for layer in kept[LAYERS].tolist()} if kept else set(order)
    for name, logit in order.items():
        if name == LAYERS:
            continue
        if name not in alive:
            count = 0
        elif name.endswith("attention") and size.components is not None:
            by_group = logit.view(-1, size.per)
            best = by_group.sigmoid().sum(1).topk(min(len(by_group), size.heads)).indices
            allowed = torch.full_like(by_group, -torch.inf)
            allowed[best] = by_group[best]
            logit = allowed.flatten()
            count = min(size.components, int(logit.isfinite().sum()))
        else:
            count = min(len(logit), size.features if name.endswith("mlp") else size.heads)
        kept[name] = logit.topk(count).indices.sort().values
    return kept


def inside(
    now: Mapping[str, Int[Tensor, "_now"]], then: Mapping[str, Int[Tensor, "_then"]], per: int
) -> dict[str, Int[Tensor, "_then"]]:
    """The nodes `then` by the names and numbers they have in a circuit of which only `now` was kept. per: components a KV group has (1
    where groups are nodes)."""
    found = {name: relabelled(nodes, then[name], per if name.endswith("attention") else 1) for name, nodes in now.items()}
    if LAYERS not in now:
        return found
    renamed = {f"L{place}.attention": found[f"L{layer}.attention"] for place, layer in enumerate(now[LAYERS].tolist())}
    return renamed | {LAYERS: found[LAYERS]}
