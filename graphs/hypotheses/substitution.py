"""Substitution: run a model with hypotheses in the place of what they are about, everything after them free to answer.

At every site the run has nodes' own activations a(x, P), with x what the site reads in this very run and P its heads' patterns. A
`Change` puts other patterns, other activations or another error in their place, and the site then writes

    y + (a' - a) @ writes + (e' - e),    e = y - a @ writes - constant (what the nodes do not say; 0 in a circuit)

A table's values depend on the text alone. An equation's parents are read as they stand in this run, substituted or not, so hypotheses
compose. The null control deals a hypothesis' values to the wrong tokens: `dealt` permutes values over the real tokens of the batch,
and a pattern's weights over what each token sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.activations import first, hooks
from graphs.architectures import post_norm
from graphs.batches import Batch
from graphs.components import Components
from graphs.edges import Reconstruction, activations, errors
from graphs.graph import Index
from graphs.hypotheses.hypothesis import Head, Hypothesis, Look, Sum, Tables
from graphs.hypotheses.views import Text
from graphs.intervene import Held
from graphs.trace import eager, routing


@dataclass(frozen=True)
class Looking:
    """Heads of one site, and the patterns that stand in for theirs."""

    heads: Int[Tensor, "head"]
    pattern: Float[Tensor, "row head token source"]


@dataclass(frozen=True)
class Equations:
    """Equations of some nodes of one site. by_site: coefficients of earlier nodes; by_token: of the token at hand."""

    nodes: Int[Tensor, "node"]
    by_site: Mapping[str, Float[Tensor, "node parent"]]
    by_token: Float[Tensor, "node vocabulary"]
    constant: Float[Tensor, "node"]

    def values(self, ids: Int[Tensor, "row token"], seen: Mapping[str, Tensor]) -> Float[Tensor, "row token node"]:
        """relu(sum)."""
        total = self.constant + self.by_token.T[ids]
        for name, weight in self.by_site.items():
            total = total + seen[name] @ weight.T
        return torch.relu(total)


@dataclass(frozen=True)
class Change:
    """What one run puts in place, by site name; later entries of a list win. errors: constants in the place of errors."""

    looks: Mapping[str, Sequence[Looking]] = field(default_factory=dict)
    values: Mapping[str, Sequence[Held]] = field(default_factory=dict)
    equations: Mapping[str, Equations] = field(default_factory=dict)
    errors: Mapping[str, Float[Tensor, "d_out"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Means:
    """What ablation puts in place: each node's mean activation and each site's mean error over clean tokens."""

    nodes: Mapping[str, Float[Tensor, "_node"]]
    errors: Mapping[str, Float[Tensor, "_d_out"]]


@torch.no_grad()
def means(subject: Reconstruction, batches: Sequence[Batch]) -> Means:
    """Over the real tokens of `batches`."""
    nodes: dict[str, Tensor] = {}
    missing: dict[str, Tensor] = {}
    count = sum(int(batch.real.sum()) for batch in batches)
    for batch in batches:
        seen = subject.trace(batch.ids)
        for name, part in subject.basis.items():
            own = activations(part, seen.sites[name])
            nodes[name] = nodes.get(name, torch.zeros(())) + own[batch.real].sum(0) / count
            missing[name] = missing.get(name, torch.zeros(())) + errors(part, seen.sites[name], own)[batch.real].sum(0) / count
    return Means(nodes, missing)


@torch.no_grad()
def run(
    subject: Reconstruction, ids: Int[Tensor, "row token"], change: Change, values: dict[str, Tensor] | None = None
) -> Float[Tensor, "row token vocabulary"]:
    """Logits under `change`; `values` is filled with the activations that sites wrote.

    Raises ValueError where a norm scales what a site writes (Gemma): its nodes have no fixed write vectors.
    """
    host, shape = subject.host, (*ids.shape, subject.host.config.hidden_size)
    if any(post_norm(host.model, site) is not None for site in host.sites):
        raise ValueError(f"hypotheses are not tested in {type(host.model).__name__}: a norm scales what each of its sublayers writes; use a model "
                         "of another class")
    x: dict[str, Tensor] = {}
    patterns: dict[str, Tensor] = {}
    values = {} if values is None else values

    def reading(names: list[str]):
        def hook(_module, _args, _kwargs, output):
            x.update({name: output.reshape(shape) for name in names})
        return hook

    def attending(name: str):
        def hook(_module, args, kwargs, output):
            patterns[name] = routing(subject.stand_ins, name, args, kwargs, output)
        return hook

    def writing(name: str):
        def hook(_module, _args, output):
            y = first(output)
            moved = (y.reshape(shape) + _moved(subject, name, ids, change, x[name], patterns.get(name), y.reshape(shape), values)).reshape(y.shape)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved
        return hook

    with eager([host.model.config, *(part.config for part in subject.stand_ins.values())]), hooks() as handles:
        by_norm: dict[str, list[str]] = {}
        for site in host.sites:
            by_norm.setdefault(site.norm, []).append(site.name)
            if site.kind == "attention":
                handles.append(host.module(site.module).register_forward_hook(attending(site.name), with_kwargs=True))
            handles.append(host.module(site.writes).register_forward_hook(writing(site.name)))
        for path, names in by_norm.items():
            handles.append(host.module(path).register_forward_hook(reading(names), with_kwargs=True))
        return host.model(input_ids=ids, use_cache=False).logits


def _moved(
    subject: Reconstruction, name: str, ids: Tensor, change: Change, x: Tensor, pattern: Tensor | None, y: Tensor, values: dict[str, Tensor]
) -> Float[Tensor, "row token d_out"]:
    """What the change adds at one site; notes the site's activations in `values`."""
    part = subject.basis[name]
    if isinstance(part, Components):
        assert pattern is not None
        own = part.activations(x, pattern)
        for look in change.looks.get(name, ()):
            pattern = pattern.index_copy(1, look.heads, look.pattern.to(pattern))
        now = part.activations(x, pattern) if name in change.looks else own
    else:
        own = now = part.activations(x)
    if name in change.values or name in change.equations:
        now = now.clone()
    for held in change.values.get(name, ()):
        now[..., held.nodes] = held.values
    if name in change.equations:
        now[..., change.equations[name].nodes] = change.equations[name].values(ids, values)
    values[name] = now
    added = (now - own) @ part.writes
    if name in change.errors:
        added = added + change.errors[name] - (y - own @ part.writes - part.constant)
    return added


def compiled(nodes: Index, subject: Reconstruction, hypotheses: Sequence[Hypothesis]) -> dict[str, Equations]:
    """Equations by site, ready to run. Raises ValueError where a parent is no token, feature or component."""
    found: dict[str, Equations] = {}
    by_site: dict[str, list[tuple[int, Sum]]] = {}
    for one in hypotheses:
        assert isinstance(one.rule, Sum)
        block = nodes.block(nodes.find(one.target))
        by_site.setdefault(block.name, []).append((nodes.find(one.target) - block.start, one.rule))
    for name, sums in by_site.items():
        tables: dict[str, Tensor] = {}
        for row, (_, rule) in enumerate(sums):
            for parent, weight in rule.terms.items():
                number = nodes.find(parent)
                block = nodes.block(number)
                if block.kind not in ("token", "feature", "attention"):
                    raise ValueError(f"{parent}: an equation's parents are tokens, features and components; make the hypotheses again")
                tables.setdefault(block.name, torch.zeros(len(sums), block.count))[row, number - block.start] += weight
        by_token = tables.pop("token", torch.zeros(len(sums), nodes.by_name["token"].count))
        found[name] = Equations(torch.tensor([place for place, _ in sums]), tables, by_token, torch.tensor([rule.constant for _, rule in sums]))
    return found


def place(nodes: Index, target: str) -> tuple[str, Int[Tensor, "node"]]:
    """The site of a target and its nodes there: one, or a head's components. Raises ValueError where there is none."""
    if ".H" in target and ".C" not in target:
        start = nodes.find(f"{target}.C0")
        block = nodes.block(start)
        return block.name, start - block.start + torch.arange(block.width)
    number = nodes.find(target)
    block = nodes.block(number)
    return block.name, torch.tensor([number - block.start])


def head(target: str) -> int:
    """The number of a head in its layer."""
    return int(target.rsplit(".H", 1)[1])


def uniform(text: Text) -> Float[Tensor, "row token source"]:
    """What stands in for an ablated pattern: a token looks at all that it sees alike."""
    return text.seen / text.seen.sum(-1, keepdim=True)


def coded(nodes: Index, text: Text, one: Hypothesis) -> tuple[str, Looking | Held]:
    """What a hypothesis other than an equation puts in place on one batch, and at which site."""
    site, numbers = place(nodes, one.target)
    match one.rule:
        case Look():
            return site, Looking(torch.tensor([head(one.target)]), one.rule.pattern(text)[:, None])
        case Head():
            return site, Held(numbers, one.rule.activations(text))
        case Tables():
            return site, Held(numbers, one.rule.values(text))
    raise TypeError(f"{one.target}: an equation has no values without a run; give it one")


def in_place(nodes: Index, subject: Reconstruction, text: Text, hypotheses: Sequence[Hypothesis]) -> Change:
    """All of them at once; of two about one node the later one stands, and an equation before any."""
    parts = [coded(nodes, text, one) for one in hypotheses if not isinstance(one.rule, Sum)]
    return replace(joined(parts), equations=compiled(nodes, subject, [one for one in hypotheses if isinstance(one.rule, Sum)]))


def dealt(what: Looking | Held, text: Text, generator: torch.Generator) -> Looking | Held:
    """The same numbers at the wrong tokens."""
    if isinstance(what, Looking):
        noise = torch.rand(text.seen.shape, generator=generator).masked_fill(~text.seen, 2.0)
        order = noise.argsort(-1)[:, None].expand_as(what.pattern)
        ranked = what.pattern.sort(-1, descending=True).values  # zeros last: as many as what is not seen
        return Looking(what.heads, torch.zeros_like(what.pattern).scatter(-1, order, ranked))
    values, real = what.values.clone(), text.batch.real
    inside = values[real]
    values[real] = inside[torch.randperm(len(inside), generator=generator)]
    return Held(what.nodes, values)


def joined(parts: Sequence[tuple[str, Looking | Held]]) -> Change:
    """All of them at once."""
    looks: dict[str, list[Looking]] = {}
    values: dict[str, list[Held]] = {}
    for site, what in parts:
        if isinstance(what, Looking):
            looks.setdefault(site, []).append(what)
        else:
            values.setdefault(site, []).append(what)
    return Change(looks, values)


def merged(parts: Sequence[tuple[str, Looking | Held]]) -> list[tuple[str, Looking | Held]]:
    """The same with all values of a site in one piece, which runs faster."""
    found: list[tuple[str, Looking | Held]] = [(site, what) for site, what in parts if isinstance(what, Looking)]
    by_site: dict[str, list[Held]] = {}
    for site, what in parts:
        if isinstance(what, Held):
            by_site.setdefault(site, []).append(what)
    for site, many in by_site.items():
        found.append((site, Held(torch.cat([one.nodes for one in many]), torch.cat([one.values for one in many], -1))))
    return found


def divergences(
    logits: Float[Tensor, "row token vocabulary"], target: Float[Tensor, "row token vocabulary"], batch: Batch
) -> Float[Tensor, "row token"]:
    """KL(target || logits) in nats at every place that predicts a token of the completion; 0 elsewhere (and at the last place)."""
    said = batch.completion[:, 1:]
    q, p = logits[:, :-1][said].log_softmax(-1), target[:, :-1][said].log_softmax(-1)
    found = torch.zeros(batch.ids.shape)
    found[:, :-1][said] = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    return found
