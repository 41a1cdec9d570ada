"""Hypotheses: what a node, a head's pattern or a whole head computes, said as code and a few fitted numbers.

    kind      target              value at token i
    table     a node              tables over views, the first that knows its key: f[key(i)], else a constant
    equation  a feature           relu(sum_p c_p a_p(i) + constant), p parents at the same token that are explained themselves
    look      a head's pattern    softmax over sources j of sum_r w_r [r(i, j)] + d[i - j] + u[key(i), key(j)]
    head      a head's components sum_j look(i, j) f[key(j)]

A yes-or-no claim ("is inside the argument list") is a table of two numbers: scale and offset are its entries. A hypothesis is data (names of
registered functions and numbers), so it is stored as JSON and nothing that is read back is ever run. `numbers` counts what was
fitted: a table of thousands of entries may be right and is not understood, so there is a limit to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.hypotheses.views import RELATIONS, VIEWS, Text

FAR = 32
"""Distances from here on are one."""
APART = "\t"
"""Stands between the two keys of a pair."""


@dataclass(frozen=True)
class Table:
    """A view and what its keys are worth: one number for a node, one a component for a head."""

    view: str
    values: Mapping[str, Sequence[float]]

    def known(self, text: Text) -> tuple[Tensor, Tensor]:
        """(whether each token's key is in the table, what it is worth "row token value")."""
        keys, codes = text.keys(self.view)
        width = len(next(iter(self.values.values()), (0.0,)))
        worth = torch.tensor([list(self.values.get(key, (0.0,) * width)) for key in keys])
        return torch.tensor([key in self.values for key in keys])[codes], worth[codes]


@dataclass(frozen=True)
class Tables:
    """Tables, the finest first; a token has the value of the first that knows it, else `otherwise`."""

    tables: tuple[Table, ...]
    otherwise: tuple[float, ...]

    @property
    def numbers(self) -> int:
        """Numbers that were fitted."""
        return len(self.otherwise) * (1 + sum(len(table.values) for table in self.tables))

    def values(self, text: Text) -> Float[Tensor, "row token value"]:
        """What code says of each token."""
        found = torch.tensor(self.otherwise).expand(*text.batch.ids.shape, -1)
        for table in reversed(self.tables):
            known, worth = table.known(text)
            found = torch.where(known[..., None], worth, found)
        return found

    def said(self) -> str:
        """In words."""
        return " else ".join(f"{table.view} in {len(table.values)}" for table in self.tables) or "constant"


@dataclass(frozen=True)
class Sum:
    """An equation. terms: coefficient by the parent's name (as in `graphs.graph.Index`)."""

    terms: Mapping[str, float]
    constant: float

    @property
    def numbers(self) -> int:
        """Numbers that were fitted."""
        return 1 + len(self.terms)

    def said(self) -> str:
        """As a formula."""
        return "relu(" + " ".join(f"{value:+.2f}*{name}" for name, value in self.terms.items()) + f" {self.constant:+.2f})"


@dataclass(frozen=True)
class Look:
    """Where a head looks. relations and distance (by how far back, the last for all farther) are added to what the pair of keys says; asks
    and answers: the views of those keys ("": one key for all)."""

    relations: Mapping[str, float]
    distance: tuple[float, ...] = ()
    asks: str = ""
    answers: str = ""
    pairs: Mapping[str, float] | None = None

    @property
    def numbers(self) -> int:
        """Numbers that were fitted."""
        return len(self.relations) + len(self.distance) + len(self.pairs or ())

    def pattern(self, text: Text) -> Float[Tensor, "row token source"]:
        """Each row sums to 1 over what a token sees."""
        score = torch.zeros(text.seen.shape)
        for name, weight in self.relations.items():
            score = score + weight * text.related(name)
        if self.distance:
            score = score + torch.tensor(self.distance)[distances(text)]
        if self.pairs:
            score = score + self._pairs(text)
        return score.masked_fill(~text.seen, -torch.inf).softmax(-1)

    def _pairs(self, text: Text) -> Float[Tensor, "row token source"]:
        asking, answering = ((text.keys(name) if name else ([""], torch.zeros_like(text.batch.ids))) for name in (self.asks, self.answers))
        grid = torch.tensor([[(self.pairs or {}).get(f"{one}{APART}{other}", 0.0) for other in answering[0]] for one in asking[0]])
        return grid[asking[1][:, :, None], answering[1][:, None]]

    def said(self) -> str:
        """In words."""
        parts = [f"{name} {weight:+.1f}" for name, weight in sorted(self.relations.items(), key=lambda pair: -abs(pair[1])) if abs(weight) >= 0.5]
        parts += ["distance"] * bool(self.distance)
        parts += [f"{self.answers} by {self.asks or 'anything'} ({len(self.pairs)})"] if self.pairs else []
        return "looks at " + (", ".join(parts) or "everything")


@dataclass(frozen=True)
class Head:
    """A whole head: where it looks, and what each of its components reads there."""

    look: Look
    values: Tables

    @property
    def numbers(self) -> int:
        """Numbers that were fitted."""
        return self.look.numbers + self.values.numbers

    def activations(self, text: Text) -> Float[Tensor, "row token component"]:
        """Of the head's components."""
        return self.look.pattern(text) @ self.values.values(text)

    def said(self) -> str:
        """In words."""
        return f"{self.look.said()}; copies {self.values.said()}"


Rule = Tables | Sum | Look | Head
KINDS: dict[str, type] = {"table": Tables, "equation": Sum, "look": Look, "head": Head}


@dataclass(frozen=True)
class Hypothesis:
    """target: "L2.F117", "L1.H2.C3", or "L1.H2" (a look or a head)."""

    target: str
    rule: Rule

    @property
    def kind(self) -> str:
        """See `KINDS`."""
        return next(name for name, kind in KINDS.items() if isinstance(self.rule, kind))

    def line(self) -> str:
        """In one line."""
        return f"{self.target}: {self.rule.said()}"

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return {"target": self.target, "kind": self.kind, "rule": asdict(self.rule)}


def distances(text: Text) -> Int[Tensor, "token source"]:
    """How far back each source lies, up to `FAR`."""
    width = text.batch.ids.shape[1]
    return (torch.arange(width)[:, None] - torch.arange(width)).clamp(0, FAR)


def read(data: Mapping[str, Any]) -> Hypothesis:
    """The inverse of `Hypothesis.data`. Raises ValueError where it is no hypothesis, or names a view or relation that is not registered."""
    try:
        made = Hypothesis(data["target"], _rule(data["kind"], data["rule"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a hypothesis ({error}): make the hypotheses again with distill understand") from None
    for name, known in _names(made.rule):
        if name not in known:
            raise ValueError(f"{made.target}: no view or relation is called {name!r}; make the hypotheses again with distill understand")
    return made


def _rule(kind: str, data: Mapping[str, Any]) -> Rule:
    match kind:
        case "table":
            return Tables(tuple(Table(**one) for one in data["tables"]), tuple(data["otherwise"]))
        case "equation":
            return Sum(**data)
        case "look":
            return Look(**dict(data) | {"distance": tuple(data["distance"])})
        case "head":
            look, values = _rule("look", data["look"]), _rule("table", data["values"])
            assert isinstance(look, Look) and isinstance(values, Tables)
            return Head(look, values)
    raise KeyError(kind)


def _names(rule: Rule) -> list[tuple[str, Mapping[str, Any]]]:
    match rule:
        case Tables():
            return [(table.view, VIEWS) for table in rule.tables]
        case Look():
            return [*((name, RELATIONS) for name in rule.relations), *((name, VIEWS) for name in (rule.asks, rule.answers) if name)]
        case Head():
            return _names(rule.look) + _names(rule.values)
    return []
