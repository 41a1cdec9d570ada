"""The study: propose hypotheses for a subject's heads and nodes on clean rows, judge each by substitution, keep what is accepted.

Heads first (where they look, then the whole head), then the nodes that matter most and are in no accepted head, last the equations: of
features that no table explains, over tokens and nodes that are explained by then, in order of depth. What was tried and rejected is kept
too, with the reason: a list of successes alone says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from graphs.batches import Batch
from graphs.components import Components
from graphs.edges import Reconstruction, activations
from graphs.graph import FeatureGraph, Index
from graphs.hypotheses.hypothesis import Head, Hypothesis, Look, Tables
from graphs.hypotheses.proposals import ENOUGH, equation, explained, fitted, for_nodes, looks, tables
from graphs.hypotheses.substitution import head, place
from graphs.hypotheses.verdict import Bench, Judged, judge
from graphs.hypotheses.views import Text

VALUES: tuple[tuple[str, ...], ...] = (("token",), ("pair", "token"), ("state and token", "token"))
"""Chains tried for what a head's components read at the source."""
OUTPUTS: tuple[tuple[str, ...], ...] = (("pair", "token"), ("state and token", "token"))
"""Chains tried for what a whole head says, wherever it looks."""
BETTER = 0.9
"""A larger look is judged only if its divergence is below this share of the last one judged."""
PARENTS = 24
"""Most parents of an equation."""


@dataclass
class Seen:
    """Clean rows as the subject reads them. own: activations of real tokens by site; values: what components read at each source, before
    routing; patterns: by site, of the first `routed` batches."""

    texts: list[Text]
    own: dict[str, Float[Tensor, "token node"]]
    values: dict[str, Float[Tensor, "token node"]]
    patterns: dict[str, list[Tensor]]


@torch.no_grad()
def watch(subject: Reconstruction, nodes: Index, batches: Sequence[Batch], routed: int) -> Seen:
    """Run the subject on clean rows."""
    texts = [Text.of(batch, nodes.tokens) for batch in batches]
    own: dict[str, list[Tensor]] = {}
    values: dict[str, list[Tensor]] = {}
    patterns: dict[str, list[Tensor]] = {}
    for at, batch in enumerate(batches):
        seen = subject.trace(batch.ids)
        for name, part in subject.basis.items():
            own.setdefault(name, []).append(activations(part, seen.sites[name])[batch.real])
            if isinstance(part, Components):
                values.setdefault(name, []).append(part.values(seen.sites[name].x).transpose(1, 2).flatten(2)[batch.real])
                if at < routed:
                    patterns.setdefault(name, []).append(seen.sites[name].pattern)  # type: ignore[arg-type]
    return Seen(texts, {n: torch.cat(v) for n, v in own.items()}, {n: torch.cat(v) for n, v in values.items()}, patterns)


def study(
    bench: Bench, batches: Sequence[Batch], order: Mapping[str, Float[Tensor, "_node"]], tested: int, graph: FeatureGraph | None = None,
    routed: int = 12
) -> list[Judged]:
    """Everything that was judged. order: how much each node matters, by site; tested: nodes judged; graph: parents of equations, without
    which there are none; routed: batches that looks are fitted on."""
    seen = watch(bench.subject, bench.nodes, batches, routed)
    found = of_heads(bench, seen)
    taken = {name for one in found if one.evidence.accepted and one.hypothesis.kind != "look" for name in _inside(bench.nodes, one.hypothesis.target)}
    found += of_nodes(bench, seen, order, tested, taken)
    return found + (of_equations(bench, seen, found, order, tested, graph) if graph is not None else [])


def _inside(nodes: Index, target: str) -> list[str]:
    site, numbers = place(nodes, target)
    return [nodes.name(nodes.by_name[site].start + number) for number in numbers.tolist()]


def of_heads(bench: Bench, seen: Seen) -> list[Judged]:
    """Looks, then whole heads. The simplest that is accepted ends the search for a head; of those rejected, the best is kept."""
    found: list[Judged] = []
    for name, patterns in tqdm(seen.patterns.items(), desc="heads", leave=False):
        fits = looks(seen.texts[: len(patterns)], patterns)
        for at, tried in enumerate(fits):
            target = f"{name.removesuffix('.attention')}.H{at}"
            zero, last = bench.effect(bench.ablation(target, True)), torch.inf
            judged: list[Judged] = []
            for divergence, look in tried:
                if divergence < BETTER * last and not (judged and judged[-1].evidence.accepted):
                    judged.append(judge(bench, Hypothesis(target, look), zero))
                    last = divergence
            found.append(_best(judged))
            where = found[-1].hypothesis.rule if found[-1].evidence.accepted else min(tried, key=lambda pair: pair[0])[1]
            assert isinstance(where, Look)
            found.append(_whole(bench, seen, name, target, where))
    return found


def _whole(bench: Bench, seen: Seen, name: str, target: str, look: Look) -> Judged:
    """The best hypothesis of a whole head: a coded look at coded values, or what is said wherever it looks."""
    columns, zero = place(bench.nodes, target)[1], bench.effect(bench.ablation(target, False))
    judged: list[Judged] = []
    for chain in OUTPUTS:
        judged.append(judge(bench, Hypothesis(target, _table(seen, chain, seen.own[name][:, columns])), zero))
        if judged[-1].evidence.accepted:
            return judged[-1]
    for chain in VALUES:
        judged.append(judge(bench, Hypothesis(target, Head(look, _table(seen, chain, seen.values[name][:, columns]))), zero))
        if judged[-1].evidence.accepted:
            return judged[-1]
    return _best(judged)


def _table(seen: Seen, chain: Sequence[str], target: Float[Tensor, "token value"]) -> Tables:
    return tables([fitted(seen.texts, view) for view in chain], target)


def _best(judged: Sequence[Judged]) -> Judged:
    return max(judged, key=lambda one: (one.evidence.accepted, one.evidence.recovered.value))


def of_nodes(bench: Bench, seen: Seen, order: Mapping[str, Tensor], tested: int, taken: set[str]) -> list[Judged]:
    """Tables of the `tested` nodes that matter most and have a proposal."""
    ranked = _ranked(bench.nodes, order, taken)[: 3 * tested]
    by_site: dict[str, list[int]] = {}
    for name, number in ranked:
        by_site.setdefault(name, []).append(number)
    proposed = {name: for_nodes(seen.texts, seen.own[name], numbers) for name, numbers in by_site.items()}
    chosen = [(name, number) for name, number in ranked if number in proposed[name]][:tested]
    return [judge(bench, Hypothesis(bench.nodes.name(bench.nodes.by_name[name].start + number), proposed[name][number]))
            for name, number in tqdm(chosen, desc="nodes", leave=False)]


def _ranked(nodes: Index, order: Mapping[str, Tensor], taken: set[str]) -> list[tuple[str, int]]:
    every = [(float(value), name, number) for name, values in order.items() for number, value in enumerate(values.tolist())]
    return [(name, number) for value, name, number in sorted(every, key=lambda one: -one[0])
            if value > 0 and nodes.name(nodes.by_name[name].start + number) not in taken]


def of_equations(
    bench: Bench, seen: Seen, found: Sequence[Judged], order: Mapping[str, Tensor], tested: int, graph: FeatureGraph
) -> list[Judged]:
    """Equations of features that no table explains, where tokens and explained nodes carry enough of them."""
    nodes, made = bench.nodes, []
    known = {name for one in found if one.evidence.accepted and one.hypothesis.kind != "look" for name in _inside(nodes, one.hypothesis.target)}
    wanted = set(_ranked(nodes, order, known)[: 3 * tested])
    ids = torch.cat([text.batch.ids[text.batch.real] for text in seen.texts])
    for block in tqdm([block for block in nodes.blocks if block.kind == "feature"], desc="equations", leave=False):
        fresh = []
        for number in range(block.count):
            if (block.name, number) not in wanted:
                continue
            names = [name for name in _parents(graph, block.start + number) if name in known or name.startswith("token ")][:PARENTS]
            if not names:
                continue
            columns = torch.stack([_column(nodes, seen, ids, name) for name in names], 1)
            target, cut = seen.own[block.name][:, number], 3 * len(ids) // 4
            rule = equation(columns[:cut], names, target[:cut])
            guess = torch.relu(columns[cut:] @ torch.tensor(list(rule.terms.values())) + rule.constant)
            if explained(guess[:, None], target[cut:, None]) >= ENOUGH:
                made.append(judge(bench, Hypothesis(nodes.name(block.start + number), rule)))
                fresh += [made[-1].hypothesis.target] * made[-1].evidence.accepted
        known.update(fresh)
    return made


def _parents(graph: FeatureGraph, node: int) -> list[str]:
    """Names of a node's parents, those that carry most first."""
    return [graph.index.name(int(source)) for source in graph.src[graph.into(node)]]


def _column(nodes: Index, seen: Seen, ids: Int[Tensor, "token"], name: str) -> Float[Tensor, "token"]:
    """What a parent is at each token."""
    number = nodes.find(name)
    block = nodes.block(number)
    return (ids == number - block.start).float() if block.kind == "token" else seen.own[block.name][:, number - block.start]


def coded_heads(accepted: Sequence[Hypothesis]) -> dict[str, list[int]]:
    """Heads with an accepted look, by layer name ("L1")."""
    by_layer: dict[str, list[int]] = {}
    for one in accepted:
        if one.kind == "look":
            by_layer.setdefault(one.target.split(".")[0], []).append(head(one.target))
    return by_layer
