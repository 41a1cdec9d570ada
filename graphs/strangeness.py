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
    def among(self) -> Bool[Tensor, "some some"]:
        """The pairs among them."""
        return self.learnt.pairs[self.some][:, self.some]

    def __call__(self, level: Float[Tensor, "token parent"]) -> Bool[Tensor, "token parent"]:
        """Those of each token."""
        there = level[:, self.some].abs() > self.learnt.present[self.some]
        anywhere = torch.where(there.any(0))[0]  # most parents are at rest, and their rows need not be read
        out = torch.zeros(level.shape, dtype=torch.bool)
        out[:, self.some] = there & (there[:, anywhere].float() @ self.among[anywhere].float() > 0)
        return out


@dataclass(frozen=True)
class Block:
    """One block's targets with what is familiar to them. size: of what each node writes (None of the logits)."""

    reader: Reader
    known: Familiar
    size: Float[Tensor, "target"] | None

    @cached_property
    def signed(self) -> Float[Tensor, "target column"]:
        """Sizes of the weights; negative where the parent is unfamiliar to the target, so that a product with them and one with their sizes tell the
        two kinds apart."""
        return torch.where(self.known.unfamiliar[self.known.rows], -self.reader.weights.abs(), self.reader.weights.abs())

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
        scale, nodes, out = seen.scale[self.reader.name][:, None], self.reader.parents, torch.empty(*targets.shape, len(SUMS))
        step = max(1, ELEMENTS // (targets.shape[1] * self.signed.shape[1]))
        for start in range(0, len(targets), step):
            some = slice(start, start + step)
            self._sums(seen.level[some, :nodes] * scale[some], seen.vectors[some, : self.reader.others] * scale[some, None], targets[some],
                       paired[some, :nodes], met[some], out[some])
        return targets, out.mul_(weight[..., None])

    def _sums(
        self, x: Float[Tensor, "token parent"], vectors: Float[Tensor, "token other d"], targets: Int[Tensor, "token target"],
        paired: Bool[Tensor, "token parent"], met: Bool[Tensor, "token"], out: Float[Tensor, "token target sum"],
    ) -> None:
        """Put the sums, but for the targets' own factors, into `out`."""
        chosen, nodes, shape = targets.flatten(), x.shape[1], (*targets.shape, self.signed.shape[1])
        rows, size = self.known.rows[chosen], x.abs()
        signed = self.signed.index_select(0, chosen).view(shape)
        low, high = (table.index_select(0, rows).view(shape) for table in (self.known.low, self.known.high))
        if not bool(met.all()):
            signed[~met, :, nodes], low[~met, :, nodes], high[~met, :, nodes] = -1.0, -torch.inf, torch.inf
        other = torch.bmm(self.reader.pulled.index_select(0, chosen).view(*targets.shape, -1), vectors.transpose(1, 2))
        for part, value in ((slice(nodes), x[:, None]), (slice(nodes, None), other)):
            low[..., part].sub_(value)
            high[..., part].sub_(value)
        beyond = torch.maximum(low, high.neg_(), out=low).clamp_(min=0)
        other.abs_()
        for some, most in ((beyond[..., :nodes], size[:, None]), (beyond[..., nodes:], other)):
            torch.minimum(some, most, out=some)
        both = torch.stack([size, size * paired], -1)
        apart, rest = signed[..., :nodes] @ both, (other * signed[..., nodes:]).sum(-1)
        whole, rest_whole = signed.abs_()[..., :nodes] @ both, other.sum(-1)
        torch.add(whole[..., 0], rest_whole, out=out[..., 0])
        torch.sub(whole[..., 0] - apart[..., 0], rest - rest_whole, out=out[..., 1]).mul_(0.5)
        torch.sum(beyond.mul_(signed), -1, out=out[..., 2])
        torch.add(whole[..., 1], apart[..., 1], out=out[..., 3]).mul_(0.5)

    def columns(
        self, seen: Here, token: int, target: int, paired: Bool[Tensor, "parent"], met: bool
    ) -> tuple[Float[Tensor, "column"], Float[Tensor, "sum column"]]:
        """One target of one token, parent by parent: contributions without the frozen gate, and what `SUMS` add up of them."""
        row, nodes, scale = int(self.known.rows[target]), self.reader.parents, seen.scale[self.reader.name][token]
        others = seen.vectors[token, : self.reader.others] @ self.reader.pulled[target] * scale
        value, times = torch.cat([seen.level[token, :nodes] * scale, others]), self.reader.weights[target]
        odd = self.known.unfamiliar[row].clone()
        odd[nodes] |= not met
        size = (value * times).abs()
        beyond = ((value - value.clamp(self.known.low[row], self.known.high[row])) * times).abs().minimum(size)
        both = torch.cat([paired[:nodes], torch.zeros(len(others), dtype=torch.bool)])
        return value * times, torch.stack([size, size * odd, beyond * ~odd, size * (both & ~odd)])
