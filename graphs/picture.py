"""What a viewer shows of a graph, as plain numbers and words: rows of nodes by depth, edges with their shares.

Both kinds of graph become the same thing. A global graph is cut to what a person can walk: the nodes that feed most, and of
each target the parents that carry most; what is left out is said in `about`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphs.contexts import Context
from graphs.equations import equation
from graphs.graph import FeatureGraph
from graphs.prompt_graph import PromptGraph


@dataclass(frozen=True)
class Dot:
    """A node as drawn. row: from below; token: column, in a prompt; size: 0 to 1; said: one line of facts; line: its equation."""

    name: str
    kind: str
    row: int
    token: int
    size: float
    said: str
    line: str = ""
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True)
class Picture:
    """dots; lines: (source, target, contribution or coefficient, share of the target's absolute drive); rows: names from below."""

    dots: tuple[Dot, ...]
    lines: tuple[tuple[int, int, float, float], ...]
    rows: tuple[str, ...]
    about: str
    tokens: tuple[str, ...] = field(default=())


def _row(name: str, kind: str) -> str:
    if kind in ("token", "position"):
        return "input"
    return "logits" if kind == "logit" else name.split(".")[0] + (" attention" if kind == "attention" or ".attention" in name else " mlp")


def of_graph(graph: FeatureGraph, contexts: Mapping[int, Sequence[Context]], nodes: int = 3000, edges: int = 30_000) -> Picture:
    """A global graph. contexts: by node."""
    carried = torch.zeros(graph.index.count).index_add(0, graph.src, graph.share)
    reads = {int(node) for node in graph.dst.unique()}
    order = (carried + torch.tensor([float(node in reads) * 1e-6 for node in range(graph.index.count)])).argsort(descending=True)
    kept = [node for node in order.tolist() if carried[node] > 0 or node in reads][:nodes]
    kept.sort()
    place = {node: i for i, node in enumerate(kept)}
    most = max(1, edges // max(1, sum(node in reads for node in kept)))
    lines = []
    for node in kept:
        if node in reads:
            span = graph.into(node)
            found = [e for e in range(span.start, span.stop) if int(graph.src[e]) in place][:most]
            lines += [(place[int(graph.src[e])], place[node], float(graph.flow[e] if graph.coefficient[e].isnan() else graph.coefficient[e]),
                       float(graph.share[e])) for e in found]
    rows, dots = [], []
    largest = float(carried[kept].max()) if kept else 1.0
    for node in kept:
        block, name = graph.index.block(node), graph.index.name(node)
        row = _row(block.name, block.kind)
        if row not in rows:
            rows.append(row)
        line = equation(graph, node, 6).line() if node in reads else ""
        said = f"{block.kind}, active on {float(graph.active[node]):.1%} of tokens"
        dots.append(Dot(name, block.kind, rows.index(row), 0, float(carried[node]) / largest, said, line, tuple(contexts.get(node, ()))))
    total = len({*graph.src.tolist(), *reads})
    about = (f"{len(dots):,} of {total:,} nodes, {len(lines):,} of {len(graph.src):,} edges (at most {most} parents a node); "
             "numbers on edges: contribution a unit, of errors the mean")
    return Picture(tuple(dots), tuple(lines), tuple(rows), about)


def of_prompt(graph: PromptGraph) -> Picture:
    """A prompt's graph."""
    size = graph.weight.abs()
    total = torch.zeros(len(graph.nodes)).index_add(0, graph.dst, size).clamp_min(1e-12)
    share = (size / total[graph.dst]).tolist()
    lines = tuple(zip(graph.src.tolist(), graph.dst.tolist(), graph.weight.tolist(), share, strict=True))
    rows, dots = [], []
    largest = max((one.influence for one in graph.nodes if one.kind != "logit"), default=1.0)
    for one in graph.nodes:
        row = _row(one.name, one.kind)
        if row not in rows:
            rows.append(row)
        said = f"{one.kind} at token {one.token} {graph.tokens[one.token]!r}; activation {one.activation:.3g}, influence {one.influence:.2%}"
        dots.append(Dot(one.name, one.kind, rows.index(row), one.token, min(1.0, one.influence / largest), said))
    about = (f"what follows the prompt's last token: {len(dots):,} nodes hold {graph.kept:.0%} of the influence; replacement score "
             f"{graph.replacement:.3f}, completeness {graph.completeness:.3f}; numbers on edges: contribution")
    return Picture(tuple(dots), lines, tuple(rows), about, graph.tokens)
