"""Equations: what a node computes, as one line a person can read, with its uncertainty.

    L2.F117 = relu(3.1(+-0.1)*L0.F44 + 4.0(+-0.3)*L1.H2.C3 - 1.2 + rest)

A coefficient is the contribution per unit of the parent's activation, averaged over the clean tokens where the node is
active; (+-) is its standard deviation over those tokens, because the norm's scale (and a head's pattern) differ from token to
token: where it is large, no single global number describes the edge. What the printed parents leave out is stated, as a
share of the absolute drive and as its mean. An error has no activation to multiply: it stands as its mean, `0.02[L1.mlp.error]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphs.graph import FeatureGraph


@dataclass(frozen=True)
class Term:
    """One parent. flow: mean contribution with its standard error; share: of the absolute drive; frequency: see FeatureGraph;
    coefficient, spread and weight: None for an error, which has no activation."""

    source: str
    coefficient: float | None
    spread: float | None
    flow: float
    flow_error: float
    share: float
    frequency: float
    weight: float | None

    def said(self, digits: int) -> str:
        """The term with its sign; an error by its mean."""
        if self.coefficient is None or self.spread is None:
            return f"{'-' if self.flow < 0 else '+'} {abs(self.flow):.{digits}f}[{self.source}]"
        return f"{'-' if self.coefficient < 0 else '+'} {abs(self.coefficient):.{digits}f}(+-{self.spread:.{digits}f})*{self.source}"


@dataclass(frozen=True)
class Equation:
    """A node's drive. constant: its own bias; rest: mean flow of what is not printed; carried: share of what is; active: share of
    tokens; parents: how many carry any flow; enough: how many carry `explained` of it."""

    node: str
    kind: str
    terms: tuple[Term, ...]
    constant: float
    rest: float
    carried: float
    active: float
    mean: float
    parents: int
    enough: int
    explained: float

    def line(self, digits: int = 2) -> str:
        """The equation in one line."""
        parts = [*(term.said(digits) for term in self.terms), f"{'-' if self.constant < 0 else '+'} {abs(self.constant):.{digits}f}"]
        said = " ".join(parts).removeprefix("+ ")
        said = "-" + said[2:] if said.startswith("- ") else said
        if self.parents > len(self.terms):
            said += f" + rest({self.rest:+.{digits}f})"
        return f"{self.node} = relu({said})" if self.kind == "feature" else f"{self.node} = {said}"


def equation(graph: FeatureGraph, node: int, most: int = 8) -> Equation:
    """The equation of `node` with its `most` parents that carry most. Raises ValueError where a node has no parents by kind."""
    block = graph.index.block(node)
    if block.kind not in ("feature", "attention", "logit"):
        raise ValueError(f"{graph.index.name(node)} reads nothing: name a feature, an attention component or a logit")
    edges = graph.into(node)
    every = range(edges.start, edges.stop)
    terms = tuple(
        Term(graph.index.name(int(graph.src[e])), _number(graph.coefficient[e]), _number(graph.spread[e]), float(graph.flow[e]),
             float(graph.flow_error[e]), float(graph.share[e]), float(graph.frequency[e]), _number(graph.weight[e])) for e in every[:most])
    return Equation(graph.index.name(node), block.kind, terms, float(graph.constant[node]), float(graph.drive[node]) - sum(t.flow for t in terms),
                    sum(t.share for t in terms), float(graph.active[node]), float(graph.mean[node]), int(graph.parents[node]), len(every),
                    float(graph.explained[node]))


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def listing(graph: FeatureGraph, most: int = 4) -> list[Equation]:
    """Every node that is ever active, in order of depth: each value is defined before its uses."""
    blocks = [block for block in graph.index.blocks if block.kind in ("feature", "attention", "logit")]
    return [equation(graph, node, most) for block in blocks for node in range(block.start, block.start + block.count)
            if graph.into(node).start < graph.into(node).stop]
