"""History: choices that are never made once a text has shown something.

What a text has shown up to a token is, of every node, the most and the least that it was at any token so far. Both only ever grow: **nothing that
is written later takes back what was read**, so what they exclude stays excluded whatever is appended. A range beside each token (`graphs.enforce`)
cannot say this: a text that keeps a node from being *read* leaves every value usual.

    rule      node, side, bound, choice: where the node was beyond the bound, the choice is not made
    learnt    from clean rows: of the rows whose prompt shows the node beyond the bound not one makes the choice anywhere in its answer, where by
              the share of all rows that make it at least `EXPECTED` would have
    bound     midway between the farthest that the node had been in any row when it made the choice, and the median of those farther
    choices   those that at least `COMMON` of the rows make: a rarer one may be missing beside a node because clean rows do not happen to combine
              the two, and to write it there is what a model is for
    nodes     up to `MOST` a choice, each time the one that is beyond its bound in most rows, a row counting half for each node it already has

Clean rows must hold more than one kind of answer (refusals beside answers, say): where all are of a kind there is next to no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.batches import Batch

COMMON, EXPECTED, MOST = 0.25, 20, 16
KEPT = "shown"
"""What a cache calls it."""
ROOM = 1 << 31
"""Bytes that the nodes of all clean rows may take while rules are learnt."""
Values = Mapping[str, Float[Tensor, "row token _value"]]


@dataclass(frozen=True)
class History:
    """The rules. reads: by the name of a site's nodes, which of their values (or of the negatives, which come after them) some rule reads; read,
    bound, choice: of each rule, its place among all reads, its bound, and the token that is not written beyond it."""

    reads: dict[str, Int[Tensor, "_read"]]
    read: Int[Tensor, "rule"]
    bound: Float[Tensor, "rule"]
    choice: Int[Tensor, "rule"]

    @staticmethod
    def nothing() -> History:
        """No rule."""
        none = torch.zeros(0, dtype=torch.long)
        return History({}, none, torch.zeros(0), none)

    def shown(self, values: Values, real: Bool[Tensor, "row token"] | None = None) -> Float[Tensor, "row token read"]:
        """The most that each read was up to each token. real: tokens that are no pads (None: all)."""
        seen = torch.cat([both(values[name])[..., places] for name, places in self.reads.items()], -1)
        return seen.masked_fill(~real[..., None], -torch.inf).cummax(1).values if real is not None else seen.cummax(1).values

    def excluded(self, shown: Float[Tensor, "row token read"], vocabulary: int) -> Bool[Tensor, "row token vocabulary"]:
        """Choices that are not made after what was shown."""
        hit = (shown[..., self.read] > self.bound).float()
        return hit @ torch.nn.functional.one_hot(self.choice, vocabulary).to(hit) > 0

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"read": self.read, "bound": self.bound, "choice": self.choice} | {f"reads/{name}": value for name, value in self.reads.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> History:
        """From what `tensors` gave."""
        reads = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("reads/")}
        return History(reads, tensors["read"], tensors["bound"], tensors["choice"])


def both(value: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch side"]:
    """The values and their negatives: what is most of these is least of those."""
    return torch.cat([value, -value], -1)


def carried(shown: Float[Tensor, "row token read"], cache: Any) -> Float[Tensor, "row token read"]:
    """What was shown in this pass and in those before it, which the key/value cache (None: there is none) keeps beside its own rows."""
    if cache is None:
        return shown
    if (before := getattr(cache, KEPT, None)) is not None:
        shown = torch.maximum(shown, before[:, None])
    else:
        select = cache.batch_select_indices

        def both_select(rows: Tensor) -> None:  # rows that have ended leave the batch
            select(rows)
            setattr(cache, KEPT, getattr(cache, KEPT)[rows])

        cache.batch_select_indices = both_select
    setattr(cache, KEPT, shown[:, -1])
    return shown


@torch.no_grad()
def learn(nodes: Callable[[Batch], Values], batches: Sequence[Batch]) -> History:
    """The rules of clean batches, which are gone through once. nodes: all nodes of a batch, by name. Raises ValueError where they take too much
    memory."""
    common, made = _common(batches)
    start: list[Tensor] = []
    widths: dict[str, int] = {}
    most = torch.zeros(0)
    for batch in batches:
        found = nodes(batch)
        shown = torch.cat([both(value.float()) for value in found.values()], -1).cummax(1).values
        if not widths:
            widths = {name: value.shape[-1] for name, value in found.items()}
            most = torch.full((len(common), shown.shape[-1]), -torch.inf)
            if (needs := 4 * len(made) * shown.shape[-1]) > ROOM:
                raise ValueError(f"rules of history need {needs:,} bytes for the nodes of {len(made):,} clean rows, more than {ROOM:,}: give "
                                 "fewer --rows")
        answered, chosen = batch.completion[:, 1:], batch.ids[:, 1:]
        start.append(torch.stack([row[int(one.int().argmax())] for row, one in zip(shown, answered, strict=True)]))
        for place, choice in enumerate(common.tolist()):
            if (at := answered & (chosen == choice)).any():
                most[place] = torch.maximum(most[place], shown[:, :-1][at].amax(0))
    return _rules(torch.cat(start), most, made, common, widths)


def _common(batches: Sequence[Batch]) -> tuple[Int[Tensor, "choice"], Bool[Tensor, "row choice"]]:
    """Choices that enough rows make, but not all; and which rows make them."""
    rows = []
    for batch in batches:
        size = int(batch.ids.max()) + 1
        rows += [torch.bincount(ids[own], minlength=size) > 0 for ids, own in zip(batch.ids, batch.completion, strict=True)]
    width = max((len(row) for row in rows), default=0)
    made = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]) if rows else torch.zeros(0, 0, dtype=torch.bool)
    share = made.float().mean(0) if len(made) else torch.zeros(0)
    common = ((share >= COMMON) & (share < 1)).nonzero().flatten()
    return common, made[:, common]


def _rules(
    start: Float[Tensor, "row side"], most: Float[Tensor, "choice side"], made: Bool[Tensor, "row choice"], common: Int[Tensor, "choice"],
    widths: Mapping[str, int],
) -> History:
    """start: what each row's prompt showed; most: the most that was shown when a choice was made."""
    found: list[tuple[int, float, int]] = []
    for place, choice in enumerate(common.tolist()):
        others = start[~made[:, place]]
        enough = EXPECTED / float(made[:, place].float().mean())
        sides = ((others > most[place]).sum(0) >= enough).nonzero().flatten()
        far = others[:, sides].masked_fill(others[:, sides] <= most[place, sides], torch.nan)
        bounds = (most[place, sides] + far.nanmedian(0).values) / 2
        beyond = others[:, sides] > bounds
        weight, kept = torch.ones(len(others)), (beyond.sum(0) >= enough).float()
        for _ in range(min(MOST, int(kept.sum()))):
            best = int(((weight @ beyond.float()) * kept).argmax())
            found.append((int(sides[best]), float(bounds[best]), choice))
            weight, kept[best] = torch.where(beyond[:, best], weight / 2, weight), 0.0
    if not found:
        return History.nothing()
    used = sorted({side for side, _, _ in found})
    reads, first = {}, 0
    for name, width in widths.items():
        if here := [side - first for side in used if first <= side < first + 2 * width]:
            reads[name] = torch.tensor(here)
        first += 2 * width
    side, bound, choice = (torch.tensor(one) for one in zip(*found, strict=True))
    return History(reads, torch.searchsorted(torch.tensor(used), side), bound, choice)
