"""Proposals: hypotheses made automatically from clean rows, the simplest that says enough.

Nodes. For every chain of views (a token's own text; the automaton's state; pairs, triples, the line so far, each with coarser ones
for what it has not seen) the table of mean activations is fitted on three quarters of the rows. Entries are ranked by how much of the
node's variance they say and cut at the fewest that hold nearly all of it, never more than `MOST`. The chain with the fewest numbers that
comes near the best on the last quarter is proposed, where it explains at least `ENOUGH` of the variance there.

Heads. Log-linear looks are fitted to the heads of a layer together by KL(pattern || coded pattern) with Adam: relations and distance, then
also what is looked at, then also who asks. The first that comes near the best is proposed, and with it a whole head whose components are
tables over what stands at the source.

Equations. relu(sum of the best explained parents), fitted by least squares on tokens where the node or its equation is active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.hypotheses.hypothesis import APART, FAR, Look, Sum, Table, Tables, distances
from graphs.hypotheses.views import RELATIONS, Text

CHAINS = (("state",), ("token",), ("previous token",), ("position",), ("what followed",), ("state and token", "token"), ("pair", "token"),
          ("seen before", "token"), ("line", "state and token"), ("triple", "pair", "token"))
"""Views, the finest first."""
LOOKS = (("", ""), ("", "token"), ("state", "token"), ("token", "token"), ("token", "state and token"))
"""Views of the token that asks and of the one that answers."""
MOST = 256
"""Entries in one hypothesis' tables: more would be a list and no rule."""
ENOUGH = 0.5
"""Share of a node's variance that a proposal explains on rows it was not fitted on."""
NEAR = 0.05
"""How far a simpler proposal may fall behind the best."""
SAID = 0.98
"""Share of what all entries say that the listed ones must say."""
SEEN = 3
"""Occurrences below which a key has no entry."""


@dataclass(frozen=True)
class Fitted:
    """A table before it is cut. codes: which key each token has; mean and count by key."""

    view: str
    keys: list[str]
    codes: Int[Tensor, "token"]
    count: Float[Tensor, "key"]


def fitted(texts: Sequence[Text], view: str) -> Fitted:
    """The keys that a view gives the real tokens of `texts`."""
    numbers: dict[str, int] = {}
    codes = []
    for text in texts:
        keys, found = text.keys(view)
        codes.append(torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])[found][text.batch.real])
    every = torch.cat(codes)
    return Fitted(view, list(numbers), every, torch.bincount(every, minlength=len(numbers)).float())


def tables(views: Sequence[Fitted], target: Float[Tensor, "token value"], most: int = MOST) -> Tables:
    """The cut tables of one chain for one target (several values: one table for all)."""
    otherwise = target.mean(0)
    guess, entries = otherwise.expand_as(target), []
    for level, one in enumerate(reversed(views)):  # the coarsest first
        summed = torch.zeros(len(one.keys), target.shape[1]).index_add(0, one.codes, target)
        before = torch.zeros_like(summed).index_add(0, one.codes, guess)
        often = one.count >= SEEN
        mean = summed / one.count.clamp_min(1)[:, None]
        gain = torch.where(often, (mean - before / one.count.clamp_min(1)[:, None]).square().sum(1) * one.count, 0.0)
        entries.append((level, one, mean, gain))
        guess = torch.where(often[one.codes][:, None], mean[one.codes], guess)
    gains = torch.cat([gain for *_, gain in entries])
    ordered = gains.sort(descending=True).values
    enough = int((ordered.cumsum(0) < SAID * ordered.sum()).sum())
    least = ordered[min(enough, most, len(ordered) - 1)].clamp_min(1e-12)
    kept = tuple(Table(one.view, {one.keys[key]: mean[key].tolist() for key in torch.where(gain >= least)[0].tolist()})
                 for _, one, mean, gain in reversed(entries))
    return Tables(tuple(table for table in kept if table.values), tuple(_rest(views, kept, target).tolist()))


def _rest(views: Sequence[Fitted], kept: Sequence[Table], target: Tensor) -> Float[Tensor, "value"]:
    """The mean over tokens that no table knows."""
    unknown = torch.ones(len(target), dtype=torch.bool)
    for one, table in zip(views, kept, strict=True):
        listed = torch.tensor([key in table.values for key in one.keys])
        unknown &= ~listed[one.codes]
    return target[unknown].mean(0) if unknown.any() else target.mean(0)


def explained(guess: Float[Tensor, "token value"], target: Float[Tensor, "token value"]) -> float:
    """Share of variance explained."""
    return 1 - float((target - guess).square().sum() / (target - target.mean(0)).square().sum().clamp_min(1e-12))


def screened(chain: Sequence[Fitted], target: Float[Tensor, "token node"], fit: slice, held: slice) -> Float[Tensor, "node"]:
    """Variance of every node that the uncut tables of a chain explain on `held`, fitted on `fit`; all nodes at once."""
    guess = target[fit].mean(0).expand_as(target)
    for one in reversed(chain):
        codes = one.codes[fit]
        count = torch.bincount(codes, minlength=len(one.keys))
        mean = torch.zeros(len(one.keys), target.shape[1]).index_add(0, codes, target[fit]) / count.clamp_min(1)[:, None]
        guess = torch.where((count >= SEEN)[one.codes][:, None], mean[one.codes], guess)
    wanted = target[held]
    return 1 - (wanted - guess[held]).square().sum(0) / (wanted - wanted.mean(0)).square().sum(0).clamp_min(1e-12)


def for_nodes(
    texts: Sequence[Text], target: Float[Tensor, "token node"], nodes: Sequence[int], enough: float = ENOUGH, most: int = MOST
) -> dict[int, Tables]:
    """The proposal of each node, where one explains enough. target: activations over the real tokens of `texts`."""
    cut = sum(int(text.batch.real.sum()) for text in texts[: max(1, 3 * len(texts) // 4)])
    fit, held = slice(0, cut), slice(cut, None)
    held_texts = texts[max(1, 3 * len(texts) // 4) :]
    views = {name: fitted(texts, name) for name in dict.fromkeys(name for chain in CHAINS for name in chain)}
    inside = {name: _part(one, fit) for name, one in views.items()}
    score = torch.stack([screened([views[name] for name in chain], target, fit, held) for chain in CHAINS], 1)  # "node chain"
    found: dict[int, Tables] = {}
    for node in nodes:
        tried: list[tuple[float, Tables]] = []
        for at in torch.where(score[node] >= max(enough, float(score[node].max()) - 2 * NEAR))[0].tolist():
            made = tables([inside[name] for name in CHAINS[at]], target[fit, node : node + 1], most)
            guess = torch.cat([made.values(text)[text.batch.real] for text in held_texts])
            tried.append((explained(guess, target[held, node : node + 1]), made))
        good = [pair for pair in tried if pair[0] >= max(enough, max(r for r, _ in tried) - NEAR)] if tried else []
        if good:
            found[node] = min(good, key=lambda pair: pair[1].numbers)[1]
    return found


def _part(one: Fitted, which: slice) -> Fitted:
    codes = one.codes[which]
    return Fitted(one.view, one.keys, codes, torch.bincount(codes, minlength=len(one.keys)).float())


def looks(texts: Sequence[Text], patterns: Sequence[Float[Tensor, "_row head _token _source"]], steps: int = 120) -> list[list[tuple[float, Look]]]:
    """By head: each log-linear look with its divergence, KL(pattern || look) in nats a token on the last quarter of the batches; the
    simplest first."""
    split = max(1, 3 * len(texts) // 4)
    found: list[list[tuple[float, Look]]] = [[] for _ in range(patterns[0].shape[1])]
    for asks, answers in LOOKS:
        for head, pair in enumerate(_fit_looks(texts, patterns, split, asks, answers, steps)):
            found[head].append(pair)
    return found


def _fit_looks(
    texts: Sequence[Text], patterns: Sequence[Tensor], split: int, asks: str, answers: str, steps: int
) -> Iterator[tuple[float, Look]]:
    """One kind of look for all heads of a layer."""
    heads, names = patterns[0].shape[1], list(RELATIONS)
    asking, answering = ({"": 0} if name == "" else _numbered(texts[:split], name) for name in (asks, answers))
    relation, far = torch.zeros(heads, len(names), requires_grad=True), torch.zeros(heads, FAR + 1, requires_grad=True)
    grid = torch.zeros(heads, len(asking), len(answering), requires_grad=True)
    related = [torch.stack([text.related(name) for name in names], -1).float() for text in texts]
    places = [_place(text, asks, asking)[:, :, None] * len(answering) + _place(text, answers, answering)[:, None] for text in texts]

    def loss(at: int) -> Tensor:
        score = torch.einsum("rtsk,hk->rhts", related[at], relation) + far[:, distances(texts[at])]
        if answers:
            score = score + grid.flatten(1)[:, places[at]].transpose(0, 1)
        log = score.masked_fill(~texts[at].seen[:, None], -torch.inf).log_softmax(-1).masked_fill(~texts[at].seen[:, None], 0.0)
        p = patterns[at]
        each = (p * (p.clamp_min(1e-12).log() - log)).sum(-1)  # "row head token"
        return each.transpose(0, 1)[:, texts[at].batch.real].mean(1)

    optimizer = torch.optim.Adam([relation, far, grid], lr=0.2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / steps) + 0.01
        optimizer.zero_grad()
        (loss(step % split).sum() + 1e-4 * (relation.square().sum() + grid.square().sum())).backward()
        optimizer.step()
    with torch.no_grad():
        held = torch.stack([loss(at) for at in range(split, len(texts))] or [loss(0)]).mean(0)
    used = (grid.detach().abs() > 0.2)
    for head in range(heads):
        pairs = {f"{one}{APART}{other}": round(grid[head, asking[one], answering[other]].item(), 3)
                 for one, other in _named(used[head], asking, answering)} if answers else None
        weights = {name: round(value, 3) for value, name in zip(relation[head].tolist(), names, strict=True)}
        yield float(held[head]), Look(weights, tuple(round(value, 3) for value in far[head].tolist()), asks, answers, pairs)


def _named(used: Tensor, asking: Mapping[str, int], answering: Mapping[str, int]) -> list[tuple[str, str]]:
    ones, others = list(asking), list(answering)
    return [(ones[a], others[b]) for a, b in used.nonzero().tolist()]


def _numbered(texts: Sequence[Text], view: str) -> dict[str, int]:
    """Keys that occur often enough; 0 stands for all others."""
    one = fitted(texts, view)
    often = [key for key, count in zip(one.keys, one.count.tolist(), strict=True) if count >= SEEN and key]
    return {"": 0} | {key: at for at, key in enumerate(often, 1)}


def _place(text: Text, view: str, numbers: Mapping[str, int]) -> Int[Tensor, "row token"]:
    if not view:
        return torch.zeros_like(text.batch.ids)
    keys, codes = text.keys(view)
    return torch.tensor([numbers.get(key, 0) for key in keys])[codes]


def equation(
    parents: Float[Tensor, "token parent"], names: Sequence[str], target: Float[Tensor, "token"], rounds: int = 8
) -> Sum:
    """relu(parents . c + constant), by Gauss-Newton from the mean: least squares where the node or the equation is active."""
    inputs = torch.cat([parents, torch.ones(len(parents), 1)], 1).double()
    wanted, weights = target.double(), None
    for _ in range(rounds):
        active = (wanted > 0) if weights is None else (wanted > 0) | (inputs @ weights > 0)
        if not active.any():
            break
        x, y = inputs[active], wanted[active]
        gram = x.T @ x
        weights = torch.linalg.solve(gram + 1e-6 * gram.diagonal().mean().clamp_min(1e-9) * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64) if weights is None else weights
    return Sum({name: float(value) for name, value in zip(names, weights[:-1].tolist(), strict=True)}, float(weights[-1]))
