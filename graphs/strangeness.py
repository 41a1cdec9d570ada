"""How much of each target's drive is strange, for many tokens and targets at once.

Of a target's absolute drive, sum over parents of |contribution|, three sums are taken: over parents that are unfamiliar to it, over what
familiar ones contribute beyond their range, and over familiar ones that stand beside another that they never stood beside (`graphs.monitor`).
A node's contribution is a weight times its activation, so the first and the third are products of a row of weights with two vectors of the token;
only ranges differ by target and parent. Tables of the targets looked at are gathered, `ELEMENTS` numbers at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.edges import Basis
from graphs.familiar import Familiar, Here, Learnt, Reader

STRONGEST = 16
"""Targets of a block that are looked at in a token: those that write most."""
ELEMENTS = 1 << 20
SUMS = ("all", "unfamiliar", "range", "pairs")


@dataclass(frozen=True)
class Pairs:
    """Which parents stand beside one that they never stood beside. some: those that have such a partner at all."""

    learnt: Learnt

    @cached_property
    def some(self) -> Int[Tensor, "some"]:
        """Parents with a strange partner."""
        return torch.where(self.learnt.pairs.any(1))[0]

    @cached_property
    def among(self) -> Float[Tensor, "some some"]:
        """The pairs among them."""
        return self.learnt.pairs[self.some][:, self.some].float()

    def __call__(self, level: Float[Tensor, "token parent"]) -> Bool[Tensor, "token parent"]:
        """Those of each token."""
        there = level[:, self.some].abs() > self.learnt.present[self.some]
        out = torch.zeros(level.shape, dtype=torch.bool)
        out[:, self.some] = there & (there.float() @ self.among > 0)
        return out


@dataclass(frozen=True)
class Block:
    """One block's targets with what is familiar to them. size: of what each node writes (None of the logits)."""

    reader: Reader
    known: Familiar
    size: Float[Tensor, "target"] | None

    @staticmethod
    def of(reader: Reader, learnt: Learnt, basis: Basis) -> Block:
        """The block as it was learnt."""
        return Block(reader, learnt.blocks[reader.name], None if reader.site is None else basis[reader.name].writes.norm(dim=1))

    def looked_at(self, seen: Here) -> tuple[Int[Tensor, "token target"], Float[Tensor, "token target"]]:
        """The strongest active targets of each token and the sizes of their frozen gates (0: it has no more active ones)."""
        if self.size is None:
            return seen.choice[:, None], torch.ones(len(seen.choice), 1)
        size = seen.active[self.reader.name].abs() * self.size
        best = size.topk(min(STRONGEST, size.shape[1]), dim=1)
        return best.indices, seen.factor[self.reader.name].gather(1, best.indices).abs() * (best.values > 0)

    def sums(
        self, seen: Here, paired: Bool[Tensor, "token parent"], met: Bool[Tensor, "token"]
    ) -> tuple[Int[Tensor, "token target"], Float[Tensor, "token target sum"]]:
        """The targets looked at, and of each one `SUMS` of |contribution|. met: tokens that clean text holds."""
        targets, weight = self.looked_at(seen)
        scale, nodes = seen.scale[self.reader.name], self.reader.parents
        x = seen.level[:, :nodes] * scale[:, None]
        out = torch.empty(*targets.shape, len(SUMS))
        step = max(1, ELEMENTS // max(1, targets.shape[1] * nodes))
        for start in range(0, len(x), step):
            some = slice(start, start + step)
            out[some] = self._nodes(x[some], targets[some], paired[some, :nodes]) + self._others(
                seen.vectors[some, : self.reader.others] * scale[some, None, None], targets[some], met[some])
        return targets, out * weight[..., None]

    def _nodes(
        self, x: Float[Tensor, "token parent"], targets: Int[Tensor, "token target"], paired: Bool[Tensor, "token parent"]
    ) -> Float[Tensor, "token target sum"]:
        """Sums over nodes, but for the targets' own factors."""
        rows, nodes, shape, size = self.known.rows[targets].flatten(), x.shape[1], (*targets.shape, x.shape[1]), x.abs()
        weights, odd, low, high = (table[:, :nodes][which].view(shape) for table, which in (
            (self.reader.weights, targets.flatten()), (self.known.unfamiliar, rows), (self.known.low, rows), (self.known.high, rows)))
        weights = weights.abs()
        familiar = weights.masked_fill(odd, 0.0)
        beyond = torch.maximum(low.sub_(x[:, None]), x[:, None] - high).clamp_(min=0)
        both = torch.stack([size, size * paired], -1)
        whole, rest = weights @ both, familiar @ both
        strange = (weights - familiar) @ both[..., :1]
        return torch.stack([whole[..., 0], strange[..., 0], (torch.minimum(beyond, size[:, None]) * familiar).sum(-1), rest[..., 1]], -1)

    def _others(
        self, vectors: Float[Tensor, "token other d"], targets: Int[Tensor, "token target"], met: Bool[Tensor, "token"]
    ) -> Float[Tensor, "token target sum"]:
        """Sums over the token that stands there and the errors; their contributions have ranges themselves."""
        rows, nodes = self.known.rows[targets], self.reader.parents
        value = self.reader.pulled[targets] @ vectors.transpose(1, 2)
        size, odd = value.abs(), self.known.unfamiliar[rows][..., nodes:]
        odd[..., 0] |= ~met[:, None]
        beyond = torch.minimum((value - value.clamp(self.known.low[rows][..., nodes:], self.known.high[rows][..., nodes:])).abs(), size)
        return torch.stack([size.sum(-1), (size * odd).sum(-1), (beyond * ~odd).sum(-1), torch.zeros(targets.shape)], -1)

    def columns(
        self, seen: Here, token: int, target: int, paired: Bool[Tensor, "parent"], met: bool
    ) -> tuple[Float[Tensor, "column"], Float[Tensor, "sum column"]]:
        """One target of one token, parent by parent: contributions without the frozen gate, and what `SUMS` add up of them."""
        row, nodes, scale = int(self.known.rows[target]), self.reader.parents, seen.scale[self.reader.name][token]
        x, weights = seen.level[token, :nodes] * scale, self.reader.weights[target]
        others = seen.vectors[token, : self.reader.others] @ self.reader.pulled[target] * scale
        value, times = torch.cat([x, others]), torch.cat([weights, torch.ones(len(others))])
        odd = self.known.unfamiliar[row].clone()
        odd[nodes] |= not met
        size = (value * times).abs()
        beyond = ((value - value.clamp(self.known.low[row], self.known.high[row])) * times).abs().minimum(size)
        both = torch.cat([paired[:nodes], torch.zeros(len(others), dtype=torch.bool)])
        return value * times, torch.stack([size, size * odd, beyond * ~odd, size * (both & ~odd)])
