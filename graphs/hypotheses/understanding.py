"""Understanding: how much of a model's effect on a task is explained, by substitution and not by counting.

Six groups stand for all that a circuit does: `code` (nodes, whole heads and patterns with an accepted hypothesis that is no equation),
`equations` (features with an accepted equation, whose parents are explained themselves), `unexplained` (kept nodes without a
hypothesis), `patterns` (where heads without an accepted look attend), `error` and `pruned`. For a set S of them

    v(S) = 1 - KL(S) / KL(nothing)        KL(model || run) in nats a completion token

where members of S do what they do (the first two: what the hypothesis says, never their own value) and the rest is ablated: nodes at their
mean on clean tokens, patterns uniform over what a token sees. All 64 sets are run, so the shares are exact Shapley values
(Shapley 1953); they sum to v(all), which is printed as it is: what it lacks of 1 is what the hypotheses get wrong.

Error and pruned are what lies between the original model and what is read:

    of the fitted graph, inside the model   error: each site's error, ablated to its mean. pruned: the graph's nodes that the circuit dropped
    of the healed circuit                   error: logits(model) - logits(fitted graph). pruned: logits(fitted graph) - logits(circuit), which is
                                            what pruning took and healing did not give back. Present: added to the logits of the run

A share is no cost: v is far from additive (beside nothing, little takes many nats off), so what leaving a group out of all costs,
v(all) - v(all but it), is given too.

Null: the same with every hypothesis' values dealt to the wrong tokens, code and equations as one player; its share must be <= NULL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import factorial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from graphs.components import Components
from graphs.edges import Reconstruction
from graphs.graph import Index
from graphs.hypotheses.hypothesis import Hypothesis, Sum
from graphs.hypotheses.study import coded_heads
from graphs.hypotheses.substitution import (
    Change,
    Equations,
    Looking,
    Means,
    coded,
    compiled,
    dealt,
    divergences,
    merged,
    place,
    run,
    uniform,
)
from graphs.hypotheses.verdict import Share, resampled
from graphs.hypotheses.views import Text
from graphs.intervene import Held

GROUPS = ("code", "equations", "unexplained", "patterns", "error", "pruned")
Said = tuple[str, str, Looking | Held]
"""A group, a site, and what one of the group's hypotheses puts in place there."""
NULL = 0.02
"""Most that shuffled hypotheses may score."""
BUCKETS = (0, 64, 128, 256)
"""Where buckets of context length begin (tokens before the predicted one)."""


def shapley(values: Float[Tensor, "*batch coalition"]) -> Float[Tensor, "*batch player"]:
    """Exact Shapley values of a game. values: of every coalition, player p in it where bit p of its number is set; v(none) counts as given."""
    players = (values.shape[-1] - 1).bit_length()
    shares = []
    for player in range(players):
        without = [one for one in range(2**players) if not one >> player & 1]
        weight = torch.tensor([factorial(one.bit_count()) * factorial(players - one.bit_count() - 1) / factorial(players) for one in without],
                              dtype=values.dtype)
        there = torch.tensor(without)
        shares.append(((values[..., there | 1 << player] - values[..., there]) * weight).sum(-1))
    return torch.stack(shares, -1)


@dataclass(frozen=True)
class Explained:
    """A subject with its accepted hypotheses. pruned: by site, nodes that the circuit dropped (fitted graph only)."""

    subject: Reconstruction
    nodes: Index
    means: Means
    accepted: Sequence[Hypothesis]
    pruned: Mapping[str, Int[Tensor, "_node"]] = field(default_factory=dict)

    def members(self) -> dict[str, dict[str, Int[Tensor, "_node"]]]:
        """The nodes of each group by site."""
        group = {site: torch.full((part.count,), GROUPS.index("unexplained")) for site, part in self.subject.basis.items()}
        for site, numbers in self.pruned.items():
            group[site][numbers] = GROUPS.index("pruned")
        for one in self.accepted:
            if one.kind != "look":
                site, numbers = place(self.nodes, one.target)
                group[site][numbers] = GROUPS.index("equations" if one.kind == "equation" else "code")
        return {name: {site: torch.where(which == at)[0] for site, which in group.items()} for at, name in enumerate(GROUPS)}


@dataclass(frozen=True)
class Prompts:
    """One batch that is scored. target: the original model's logits; added: what `error` and `pruned` add to a circuit's logits."""

    text: Text
    target: Float[Tensor, "row token vocabulary"]
    added: Mapping[str, Float[Tensor, "row token vocabulary"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """KL by coalition of the six groups, row and bucket, summed over completion tokens; null: the same of five, hypotheses dealt as one."""

    kl: Float[Tensor, "coalition row bucket"]
    null: Float[Tensor, "nullcoalition row bucket"]
    tokens: Float[Tensor, "row bucket"]


def score(explained: Explained, prompts: Sequence[Prompts], seed: int = 0) -> Scored:
    """Run every coalition on every batch."""
    found = [_batch(explained, one, seed) for one in tqdm(prompts, desc="coalitions", leave=False)]
    return Scored(torch.cat([one.kl for one in found], 1), torch.cat([one.null for one in found], 1), torch.cat([one.tokens for one in found]))


def _batch(explained: Explained, prompts: Prompts, seed: int) -> Scored:
    """All 64 coalitions, and 32 of the null, on one batch. Coalitions that differ in added logits alone share a run."""
    text, members = prompts.text, explained.members()
    tables = [one for one in explained.accepted if not isinstance(one.rule, Sum)]
    said: list[Said] = [("code", site, what) for site, what in merged([coded(explained.nodes, text, one) for one in tables])]
    equations = compiled(explained.nodes, explained.subject, [one for one in explained.accepted if isinstance(one.rule, Sum)])

    def game(players: Sequence[set[str]], said: Sequence[Said], equations: Mapping[str, Equations]) -> Float[Tensor, "coalition row bucket"]:
        runs: dict[frozenset[str], Tensor] = {}
        found = []
        for number in range(2 ** len(players)):
            present = frozenset().union(*(names for at, names in enumerate(players) if number >> at & 1))
            inside = present - set(prompts.added)
            if inside not in runs:
                change = _change(explained, members, text, present, said, equations)
                runs[inside] = run(explained.subject, text.batch.ids, change)
            logits = runs[inside] + sum(prompts.added[name] for name in present & set(prompts.added))
            found.append(bucketed(divergences(logits, prompts.target, text.batch)))
        return torch.stack(found)

    every = game([{name} for name in GROUPS], said, equations)
    whole = _noted(explained, text, members, said, equations)
    generator = torch.Generator().manual_seed(seed)
    wrong: list[Said] = [(group, site, dealt(what, text, generator)) for group, site, what in said]
    wrong += [("equations", site, dealt(Held(one.nodes, whole[site][..., one.nodes]), text, generator)) for site, one in equations.items()]
    null = game([{"code", "equations"}, *({name} for name in GROUPS[2:])], wrong, {})
    return Scored(every, null, bucketed(text.batch.completion.float().roll(-1, 1)))


def _noted(
    explained: Explained, text: Text, members: dict[str, dict[str, Tensor]], said: Sequence[Said], equations: Mapping[str, Equations]
) -> dict[str, Tensor]:
    """Activations with every group present."""
    found: dict[str, Tensor] = {}
    run(explained.subject, text.batch.ids, _change(explained, members, text, frozenset(GROUPS), said, equations), found)
    return found


def _change(
    explained: Explained, members: dict[str, dict[str, Tensor]], text: Text, present: frozenset[str], said: Sequence[Said],
    equations: Mapping[str, Equations],
) -> Change:
    """What a coalition puts in place."""
    looks: dict[str, list[Looking]] = {}
    values: dict[str, list[Held]] = {}
    flat, by_code = uniform(text)[:, None], coded_heads(explained.accepted)
    for site, part in explained.subject.basis.items():
        for name, nodes in members.items():
            if name not in present and len(nodes[site]):
                values.setdefault(site, []).append(Held(nodes[site], explained.means.nodes[site][nodes[site]]))
        if isinstance(part, Components):
            mine = by_code.get(site.removesuffix(".attention"), [])
            gone = [head for head in range(len(part.write)) if ("code" if head in mine else "patterns") not in present]
            if gone:
                looks.setdefault(site, []).append(Looking(torch.tensor(gone), flat.expand(-1, len(gone), -1, -1)))
    for group, site, what in said:
        if group in present and isinstance(what, Looking):
            looks.setdefault(site, []).append(what)
        elif group in present:
            values.setdefault(site, []).append(what)  # type: ignore[arg-type]
    errors = {} if "error" in present or not explained.subject.stand_ins else dict(explained.means.errors)
    return Change(looks, values, dict(equations) if "equations" in present else {}, errors)


def bucketed(values: Float[Tensor, "row token"]) -> Float[Tensor, "row bucket"]:
    """Sums over places by how many tokens stand before the predicted one."""
    edges = [*BUCKETS, max(values.shape[1] + 1, BUCKETS[-1] + 1)]
    return torch.stack([values[:, max(0, a - 1) : b - 1].sum(1) for a, b in pairwise(edges)], 1).double()


@dataclass(frozen=True)
class Understanding:
    """shares by group; without: v(all) - v(all but the group); understood: code and equations together; whole: v(all); null: what shuffled
    hypotheses score; nothing: KL(nothing) in nats a token; tokens judged."""

    shares: dict[str, Share]
    without: dict[str, Share]
    understood: Share
    whole: Share
    null: Share
    nothing: float
    tokens: int


def understanding(scored: Scored, rows: Sequence[int] | None = None, bucket: int | None = None, seed: int = 0) -> Understanding | None:
    """Of some rows (all by default) and one bucket (all by default); None where they hold no token."""
    which = torch.arange(scored.kl.shape[1]) if rows is None else torch.tensor(list(rows))

    def taken(values: Tensor) -> Float[Tensor, "coalition row"]:
        chosen = values[..., which, :]
        return chosen.sum(-1) if bucket is None else chosen[..., bucket]

    tokens = int(taken(scored.tokens[None]).sum())
    if not tokens:
        return None
    drawn = torch.cat([torch.ones(1, len(which), dtype=torch.float64), resampled(len(which), seed)])  # the rows as they are, then resamples

    def game(kl: Tensor) -> Float[Tensor, "resample coalition"]:
        total = drawn @ taken(kl).T
        return 1 - total / total[:, :1].clamp_min(1e-30)

    values, nulls = game(scored.kl), shapley(game(scored.null))
    shares = shapley(values)
    lost = {name: _share(values[:, -1] - values[:, -1 - (1 << at)]) for at, name in enumerate(GROUPS)}
    return Understanding({name: _share(shares[:, at]) for at, name in enumerate(GROUPS)}, lost, _share(shares[:, 0] + shares[:, 1]),
                         _share(values[:, -1]), _share(nulls[:, 0]), float(taken(scored.kl)[0].sum()) / tokens, tokens)


def _share(values: Float[Tensor, "resample"]) -> Share:
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Share(float(values[0]), low, high)
