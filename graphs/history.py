"""History: choices that are never made once a text has shown something.

What a text has shown up to a token is, of some directions over nodes, the most that they were at any token so far. That only ever grows:
**nothing that is written later takes back what was read**, so what it excludes stays excluded, whatever is appended. A range beside each token
(`graphs.enforce`) cannot say this: a text that keeps what was read from being *used* leaves every value usual.

    rule      direction, bound, choice: where the most of the direction is beyond the bound, the choice is not made
    choices   those that at least `COMMON` of the clean rows make, and not all. A rarer one may be missing beside something because clean rows do not
              happen to combine the two, and to write it there is what a model is for
    learnt    weighted sums of a token's nodes, one of each layer's alone and one of all, by logistic regression of "this row never makes the choice"
              on the sum's most over the row's tokens (multiple instances: Ray and Craven 2005, "Supervised versus multiple instance learning"). Of
              rows that never make it the tokens of the prompt count, each left out half of the time, so that more than one of them must tell; of the
              others all tokens do
    bound     from a third of the rows, which the direction was not learnt from: `MARGIN` of the way from the most that it was in any row with the
              choice to the median of the rows without that are beyond
    kept      where at least `COVERED` of the held-out rows that never make the choice are beyond the bound, and there are `ENOUGH` of them

So a rule is about whole kinds of answers (refusals beside programs, say): where clean rows are all of a kind there is next to none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.batches import Batch

COMMON, COVERED, ENOUGH, MARGIN = 0.25, 0.8, 20, 0.25
STEPS, TOGETHER, RATE, DECAY, LEFT_OUT = 500, 48, 3e-3, 0.01, 0.5
"""Of the regression: steps, rows of each, AdamW's learning rate and decay, and the share of tokens that is left out."""
KEPT = "shown"
"""What a cache calls what was shown."""
ROOM = 1 << 32
"""Bytes that the nodes of all clean tokens may take while rules are learnt, in half precision."""
NEVER = -1e9
Values = Mapping[str, Float[Tensor, "row token _value"]]


@dataclass(frozen=True)
class History:
    """The rules. reads: by the name of a site's nodes, what they weigh in each rule's direction; bound, choice: of each rule."""

    reads: dict[str, Float[Tensor, "_value rule"]] = field(default_factory=dict)
    bound: Float[Tensor, "rule"] = field(default_factory=lambda: torch.zeros(0))
    choice: Int[Tensor, "rule"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def shown(self, values: Values, real: Bool[Tensor, "row token"] | None = None) -> Float[Tensor, "row token rule"]:
        """The most that each direction was up to each token. real: tokens that are no pads (None: all)."""
        along = sum(values[name].float() @ weights for name, weights in self.reads.items())
        assert isinstance(along, Tensor)  # there is a rule
        return (along if real is None else along.masked_fill(~real[..., None], NEVER)).cummax(1).values

    def excluded(self, shown: Float[Tensor, "row token rule"], vocabulary: int) -> Bool[Tensor, "row token vocabulary"]:
        """Choices that are not made after what was shown."""
        return (shown > self.bound).float() @ torch.nn.functional.one_hot(self.choice, vocabulary).float() > 0

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"bound": self.bound, "choice": self.choice} | {f"reads/{name}": value for name, value in self.reads.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> History:
        """From what `tensors` gave."""
        reads = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("reads/")}
        return History(reads, tensors["bound"], tensors["choice"])


def carried(shown: Float[Tensor, "row token rule"], cache: Any) -> Float[Tensor, "row token rule"]:
    """What was shown in this pass and in those before it, which the key/value cache (None: there is none) keeps beside its own rows. Raises
    ValueError where it holds tokens of passes that did not keep theirs."""
    if cache is None:
        return shown
    if (before := getattr(cache, KEPT, None)) is not None:
        shown = torch.maximum(shown, before[:, None])
    elif int(cache.get_seq_length()) > shown.shape[1]:
        raise ValueError("the key/value cache holds tokens of a model that kept no history; give the whole text to this model, without that cache")
    else:
        for name, kept in _ROWS.items():
            setattr(cache, name, MethodType(kept, cache))
    setattr(cache, KEPT, shown[:, -1])
    return shown


def _chosen(cache: Any, rows: Tensor) -> None:
    """Some rows leave the batch."""
    type(cache).batch_select_indices(cache, rows)
    setattr(cache, KEPT, getattr(cache, KEPT)[rows])


def _reordered(cache: Any, rows: Tensor) -> None:
    """Beams change places."""
    type(cache).reorder_cache(cache, rows)
    setattr(cache, KEPT, getattr(cache, KEPT)[rows])


def _repeated(cache: Any, times: int) -> None:
    """Every row becomes several."""
    type(cache).batch_repeat_interleave(cache, times)
    setattr(cache, KEPT, getattr(cache, KEPT).repeat_interleave(times, 0))


_ROWS: dict[str, Callable[..., None]] = {"batch_select_indices": _chosen, "reorder_cache": _reordered, "batch_repeat_interleave": _repeated}
"""What moves a cache's rows: what was shown moves with them."""


@dataclass(frozen=True)
class _Row:
    """One clean row: its nodes at all tokens but the last, how many of these tokens are the prompt's, and which common choices it makes."""

    nodes: Float[Tensor, "token node"]
    prompt: int
    made: Bool[Tensor, "choice"]

    def of(self, columns: Int[Tensor, "column"]) -> _Row:
        """The same of some nodes."""
        return self if len(columns) == self.nodes.shape[1] else _Row(self.nodes[:, columns], self.prompt, self.made)


def learn(nodes: Callable[[Batch], Values], batches: Sequence[Batch]) -> History:
    """The rules of clean batches. nodes: all nodes of a batch, by name. Raises ValueError where they take too much memory."""
    choices = _common(batches)
    if not len(choices):
        return History()
    rows, widths = _rows(nodes, batches, choices)
    if len(rows) < 3 * ENOUGH:  # a third of them could not hold enough
        return History()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    held, learnt = ([rows[at] for at in some] for some in (order[: len(rows) // 3], order[len(rows) // 3 :]))
    weights: list[Tensor] = []
    bounds: list[Tensor] = []
    chosen: list[Tensor] = []
    for columns in _groups(widths):
        made = _regress([row.of(columns) for row in learnt])
        kept, beyond = _bounds([row.of(columns) for row in held], made)
        whole = torch.zeros(sum(widths.values()), len(kept))
        whole[columns] = made[:, kept]
        for table, one in ((weights, whole), (bounds, beyond[kept]), (chosen, choices[kept])):
            table.append(one)
    parts = torch.cat(weights, 1).split(list(widths.values()))
    rules = torch.cat(chosen)
    return History(dict(zip(widths, parts, strict=True)), torch.cat(bounds), rules) if len(rules) else History()


def _groups(widths: Mapping[str, int]) -> list[Int[Tensor, "column"]]:
    """Which nodes are each layer's (by the first part of their names), and all."""
    layers = [name.partition(".")[0] for name, width in widths.items() for _ in range(width)]
    alone = [torch.tensor([at for at, one in enumerate(layers) if one == layer]) for layer in dict.fromkeys(layers)]
    return [*alone, torch.arange(len(layers))] if len(alone) > 1 else alone


def _common(batches: Sequence[Batch]) -> Int[Tensor, "choice"]:
    """Choices that enough rows make, but not all."""
    counts, total = torch.zeros(0), 0
    for batch in batches:
        for ids, own in zip(batch.ids, batch.completion, strict=True):
            made = (torch.bincount(ids[own]) > 0).float()
            width = max(len(counts), len(made))
            counts = torch.nn.functional.pad(counts, (0, width - len(counts))) + torch.nn.functional.pad(made, (0, width - len(made)))
            total += 1
    return ((counts >= COMMON * total) & (counts < total)).nonzero().flatten()


@torch.no_grad()
def _rows(nodes: Callable[[Batch], Values], batches: Sequence[Batch], choices: Int[Tensor, "choice"]) -> tuple[list[_Row], dict[str, int]]:
    """Every row, and how many nodes each name has."""
    rows: list[_Row] = []
    widths: dict[str, int] = {}
    for batch in batches:
        found = nodes(batch)
        if not rows:
            widths = {name: value.shape[-1] for name, value in found.items()}
            if (needs := 2 * sum(int(one.real.sum()) for one in batches) * sum(widths.values())) > ROOM:
                raise ValueError(f"rules of history need {needs:,} bytes for the nodes of the clean rows, more than {ROOM:,}: give fewer --rows")
        together = torch.cat(list(found.values()), -1).clamp(-6e4, 6e4).half()
        for values, ids, real, own in zip(together, batch.ids, batch.real, batch.completion, strict=True):
            last = int(real.sum()) - 1
            rows.append(_Row(values[:last].clone(), last + 1 - int(own.sum()), torch.isin(choices, ids[own])))
    return rows, widths


def _most(
    rows: Sequence[_Row], weights: Float[Tensor, "node choice"], shift: Float[Tensor, "node"], left_out: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "row choice"]:
    """The most along each direction: of a row that makes the choice, of all its tokens; of the others, of the prompt's, some left out."""
    x = torch.nn.utils.rnn.pad_sequence([row.nodes for row in rows], batch_first=True).float() - shift
    place, length = torch.arange(x.shape[1])[None], torch.tensor([len(row.nodes) for row in rows])[:, None]
    prompt = place < torch.tensor([row.prompt for row in rows])[:, None]
    if left_out:
        prompt = prompt & (torch.rand(prompt.shape, generator=generator) >= left_out)
    made = torch.stack([row.made for row in rows])
    counts = torch.where(made[:, None], (place < length)[..., None], prompt[..., None])
    return (x @ weights).masked_fill(~counts, NEVER).amax(1)


def _regress(rows: Sequence[_Row]) -> Float[Tensor, "node choice"]:
    """Directions over the nodes."""
    sample = torch.cat([row.nodes for row in rows[:: -(-len(rows) // 256)]]).float()
    mean, spread = sample.mean(0), sample.std(0) + 1e-3 * sample.std(0).mean()
    generator, count = torch.Generator().manual_seed(0), len(rows[0].made)
    weights, bias = torch.zeros(len(mean), count, requires_grad=True), torch.full((count,), -2.0, requires_grad=True)
    optimizer = torch.optim.AdamW([weights, bias], lr=RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        chosen = [rows[at] for at in torch.randint(len(rows), (TOGETHER,), generator=generator).tolist()]
        most = _most(chosen, weights / spread[:, None], mean, LEFT_OUT, generator) + bias
        never = ~torch.stack([row.made for row in chosen])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(most.clamp_min(-30.0), never.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights.detach() / spread[:, None]  # of values as they are; what the mean adds moves bounds alone


@torch.no_grad()
def _bounds(rows: Sequence[_Row], weights: Float[Tensor, "node choice"]) -> tuple[Int[Tensor, "kept"], Float[Tensor, "choice"]]:
    """Which directions make a rule, and each one's bound, on rows that none was learnt from."""
    most = torch.cat([_most(rows[at : at + TOGETHER], weights, torch.zeros(len(weights))) for at in range(0, len(rows), TOGETHER)])
    made, kept, bounds = torch.stack([row.made for row in rows]), [], torch.zeros(weights.shape[1])
    for place in range(weights.shape[1]):
        own, others = most[made[:, place], place], most[~made[:, place], place]
        if len(own) and len(others) >= ENOUGH and len(far := others[others > own.max()]):
            bounds[place] = own.max() + MARGIN * (far.median() - own.max())
            if float((others > bounds[place]).float().mean()) >= COVERED:
                kept.append(place)
    return torch.tensor(kept, dtype=torch.long), bounds
