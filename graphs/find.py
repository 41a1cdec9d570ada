"""Find: the nodes that carry a trait, from prompts that show it and prompts that do not.

The trait's measure is the log-odds of the answer that the model gives where the trait is present, against the answers it
gives where it is absent: a change that merely breaks the answer does not count. A node is *held* at

    mean_absent + (strength - 1) (mean_absent - mean_present)        1: as where the trait is absent; 2: as far on the other side

Several strengths are tried, and the one that changes most answers, less those it breaks where there is no trait, is kept.

1. *Rank*, on half of the present prompts: to first order, what moving each node there takes from the log-odds, sum_t (a(t) -
   held) d log-odds / d a(t) (attribution patching: Nanda 2023; Syed et al. 2023).
2. *Screen.* The best `screened` are held one at a time and ranked anew by what that really costs, since a first-order guess can
   be far off; then a set is grown one node at a time, by the log-likelihood it gives to the other answers.
3. *Verify*, on the other half of the present prompts, which chose nothing: how many first answer tokens change with the top
   nodes held, and how many with random nodes of the same sites whose holding moves what the site writes by as much.

4. *Edges* into the held nodes are ranked by how much more they contribute, a token, where the trait is present, toward where the
   node then stands; each is cut by letting its target alone see the source as where the trait is absent, and so are all together,
   against as many random edges from the same sites into the same nodes.

The control answers "would any change of this size do?"; the absent prompts, with the same nodes held, answer "does it break
what has no trait?". Both are asked of halves that chose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.architectures import norm
from graphs.batches import Encoded, collate
from graphs.edges import Reconstruction, activations, factors, routed
from graphs.graph import Index, index
from graphs.intervene import Cut, Held, gradients, run

STRENGTHS = (1.0, 2.0, 3.0, 4.0)
"""Tried by default."""


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the right. last: place of each one's last token."""

    ids: Int[Tensor, "row token"]
    real: Bool[Tensor, "row token"]
    last: Int[Tensor, "row"]

    def half(self, which: int) -> Prompts:
        """Every second prompt."""
        return Prompts(self.ids[which::2], self.real[which::2], self.last[which::2])

    def answers(self, logits: Float[Tensor, "row token vocabulary"]) -> Int[Tensor, "row"]:
        """The likeliest next token of each prompt."""
        return self.final(logits).argmax(-1)

    def final(self, logits: Float[Tensor, "row token vocabulary"]) -> Float[Tensor, "row vocabulary"]:
        """Logits of what follows each prompt."""
        return logits[torch.arange(len(self.last)), self.last]


def padded(rows: Sequence[Sequence[int]], pad: int) -> Prompts:
    """Token ids of several prompts as one rectangle."""
    batch = collate([Encoded(tuple(row), len(row)) for row in rows], pad)
    return Prompts(batch.ids, batch.real, batch.real.sum(1) - 1)


@dataclass(frozen=True)
class Contrast:
    """The answer each present prompt gets, and the answers that prompts without the trait get: what it could have said instead."""

    answers: Int[Tensor, "row"]
    others: Int[Tensor, "other"]

    def log_odds(self, logits: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row"]:
        """Log-odds of the answer against the others together; against all tokens where there is no other."""
        own = logits.gather(1, self.answers[:, None])[:, 0]
        rest = logits.scatter(1, self.answers[:, None], -torch.inf)
        among = rest[:, self.others]
        alone = among.isneginf().all(1)
        return own - torch.where(alone, rest.logsumexp(1), among.masked_fill(alone[:, None], 0.0).logsumexp(1))


@dataclass(frozen=True)
class Found:
    """One node. guess: first-order cost of holding it; effect: log-odds that holding it alone costs (on the ranking half); present
    and absent: mean activation over tokens."""

    name: str
    site: str
    node: int
    guess: float
    effect: float
    present: float
    absent: float


@dataclass(frozen=True)
class FoundEdge:
    """One edge into a node that was held. excess: mean contribution a token where the trait is present less where it is absent;
    effect: log-odds that cutting it alone costs."""

    source: str
    target: str
    excess: float
    effect: float


@dataclass(frozen=True)
class Report:
    """nodes: best alone first; chosen: names of those held together; strength: where they are held; flipped: share of held-out
    present prompts whose answer changes, and cost: log-odds lost; random_flipped and random_cost: the same for each matched
    random set; broken: share of held-out absent prompts whose answer changes; prompts: held-out present prompts; edges: best
    first, edge_cost: log-odds that cutting them together costs on held-out prompts, and random_edge_cost: the same for each
    random set of edges."""

    nodes: tuple[Found, ...]
    chosen: tuple[str, ...]
    strength: float
    flipped: float
    cost: float
    random_flipped: tuple[float, ...]
    random_cost: tuple[float, ...]
    broken: float
    prompts: int
    edges: tuple[FoundEdge, ...]
    edge_cost: float
    random_edge_cost: tuple[float, ...]

    @property
    def p_value(self) -> float:
        """Chance of a random set that flips as many (counting this one: Phipson and Smyth 2010)."""
        return (1 + sum(one >= self.flipped for one in self.random_flipped)) / (1 + len(self.random_flipped))


@dataclass(frozen=True)
class _Case:
    """The prompts' halves, mean activations of the choosing halves (here: with the trait, there: without), and the answers given
    where the trait is absent."""

    subject: Reconstruction
    choose: Prompts
    check: Prompts
    absent: Prompts
    spared: Prompts
    here: dict[str, Tensor]
    there: dict[str, Tensor]
    others: Tensor
    nodes: Index

    def means(self, strength: float) -> dict[str, Tensor]:
        """Where nodes are held."""
        return {name: there + (strength - 1) * (there - self.here[name]) for name, there in self.there.items()}

    def name(self, site: str, node: int) -> str:
        """A node's name."""
        return self.nodes.name(self.nodes.by_name[site].start + node)


@dataclass(frozen=True)
class _Plan:
    """What one strength found on the choosing halves. gain: share of answers it changes, less the share it breaks."""

    strength: float
    found: list[Found]
    chosen: list[tuple[str, int]]
    gain: float


@torch.no_grad()
def find(
    subject: Reconstruction, present: Prompts, absent: Prompts, top: int = 5, strengths: Sequence[float] = STRENGTHS, screened: int = 60,
    controls: int = 20, edges: int = 10, seed: int = 0,
) -> Report:
    """Rank and screen at each strength, keep the best, verify. Raises ValueError where there are too few prompts."""
    if len(present.last) < 4 or len(absent.last) < 4:
        raise ValueError("give at least four prompts with the trait and four without")
    halves = present.half(0), present.half(1), absent.half(0), absent.half(1)
    others = halves[2].answers(run(subject, halves[2].ids, {})).unique()
    case = _Case(subject, *halves, mean_activations(subject, halves[0]), mean_activations(subject, halves[2]), others,
                 index(subject.host, subject.basis))
    plans = [search(case, strength, top, screened) for strength in strengths]
    return verify(case, max(plans, key=lambda plan: plan.gain), controls, edges, torch.Generator().manual_seed(seed))


def search(case: _Case, strength: float, top: int, screened: int) -> _Plan:
    """Rank and screen, on the choosing halves."""
    subject, choose, means = case.subject, case.choose, case.means(strength)
    contrast = Contrast(choose.answers(run(subject, choose.ids, {})), case.others)
    before, slopes = gradients(subject, choose.ids, lambda logits: contrast.log_odds(choose.final(logits)))
    guesses = rank(subject, choose, means, slopes)
    flat = torch.cat(list(guesses.values()))
    starts = torch.tensor([0, *(len(one) for one in guesses.values())]).cumsum(0)
    names, found = list(guesses), []
    for at in flat.argsort(descending=True)[:screened].tolist():
        which = int(torch.searchsorted(starts, at, right=True)) - 1
        site, node = names[which], at - int(starts[which])
        after = contrast.log_odds(choose.final(run(subject, choose.ids, held_at(means, [(site, node)]))))
        found.append(Found(case.name(site, node), site, node, float(flat[at]), float((before - after).mean()), float(case.here[site][node]),
                           float(case.there[site][node])))
    found.sort(key=lambda one: -one.effect)
    chosen = greedy(subject, choose, means, case.others, [(one.site, one.node) for one in found], top)
    gain = effect(subject, choose, means, case.others, chosen)[0] - effect(subject, case.absent, means, case.others, chosen)[0]
    return _Plan(strength, found, chosen, gain)


def verify(case: _Case, plan: _Plan, controls: int, edges: int, generator: torch.Generator) -> Report:
    """Nodes and edges against random ones, on the halves that chose nothing."""
    subject, means = case.subject, case.means(plan.strength)
    moved = mean_activations(subject, case.choose, means)
    flipped, cost = effect(subject, case.check, means, case.others, plan.chosen)
    random = [effect(subject, case.check, means, case.others, matched(subject, moved, plan.chosen, generator)) for _ in range(controls)]
    broken, _ = effect(subject, case.spared, means, case.others, plan.chosen)
    cuts, excess = top_edges(subject, case.choose, case.absent, plan.chosen, case.here, case.there, edges)
    alone = [cutting(subject, case.choose, case.others, [cut]) for cut in cuts]
    found_edges = tuple(FoundEdge(case.name(*cut.source), case.name(*cut.target), e, c) for cut, e, c in zip(cuts, excess, alone, strict=True))
    drawn = [other_edges(subject, cuts, case.there, generator) for _ in range(controls if cuts else 0)]
    return Report(
        tuple(plan.found), tuple(case.name(*one) for one in plan.chosen), plan.strength, flipped, cost, tuple(f for f, _ in random),
        tuple(c for _, c in random), broken, len(case.check.last), found_edges, cutting(subject, case.check, case.others, cuts),
        tuple(cutting(subject, case.check, case.others, one) for one in drawn))


def mean_contributions(subject: Reconstruction, prompts: Prompts, target: tuple[str, int]) -> dict[str, Float[Tensor, "_node"]]:
    """What each earlier node contributes to the target's drive, a real token."""
    found, site, node = subject.trace(prompts.ids), subject.host.site(target[0]), torch.tensor([target[1]])
    part, seen = subject.basis[site.name], found.sites[site.name]
    weight = routed(part, seen, node, prompts.real[..., None] * factors(part, seen, node))[..., 0]
    pulled = norm(subject.host.model, site.norm).pulled(part.reads[target[1]])
    earlier = [one.name for one in subject.host.sites if one.writes_at <= site.reads_at]
    level = {name: torch.einsum("rt,rtn->n", weight * seen.inverse, activations(subject.basis[name], found.sites[name])) for name in earlier}
    return {name: level[name] * (subject.basis[name].writes @ pulled) / prompts.real.sum() for name in earlier}


def top_edges(
    subject: Reconstruction, present: Prompts, absent: Prompts, targets: Sequence[tuple[str, int]], here: dict[str, Tensor],
    there: dict[str, Tensor], count: int,
) -> tuple[list[Cut], list[float]]:
    """The `count` edges into `targets` that push most toward where the trait has them, and their excess contributions."""
    ranked: list[tuple[float, float, Cut]] = []
    for site, node in targets:
        toward = float((here[site][node] - there[site][node]).sign())
        after, before = (mean_contributions(subject, prompts, (site, node)) for prompts in (present, absent))
        for where in after:
            excess = after[where] - before[where]
            for source in (excess * toward).topk(min(count, len(excess))).indices.tolist():
                cut = Cut((where, source), (site, node), float(there[where][source]))
                ranked.append((float(excess[source]) * toward, float(excess[source]), cut))
    ranked.sort(key=lambda one: -one[0])
    return [cut for push, _, cut in ranked[:count] if push > 0], [excess for push, excess, _ in ranked[:count] if push > 0]


def other_edges(subject: Reconstruction, cuts: Sequence[Cut], there: dict[str, Tensor], generator: torch.Generator) -> list[Cut]:
    """For each edge a random one from the same site into the same node."""
    out = []
    for cut in cuts:
        site = cut.source[0]
        source = int(torch.randint(subject.basis[site].count, (1,), generator=generator))
        out.append(Cut((site, source), cut.target, float(there[site][source])))
    return out


def cutting(subject: Reconstruction, prompts: Prompts, others: Tensor, cuts: Sequence[Cut]) -> float:
    """Log-odds lost when edges are cut."""
    plain = prompts.final(run(subject, prompts.ids, {}))
    contrast = Contrast(plain.argmax(-1), others)
    return float((contrast.log_odds(plain) - contrast.log_odds(prompts.final(run(subject, prompts.ids, {}, cuts)))).mean())


def greedy(
    subject: Reconstruction, prompts: Prompts, means: dict[str, Tensor], others: Tensor, candidates: Sequence[tuple[str, int]], top: int
) -> list[tuple[str, int]]:
    """A set of `top` candidates, grown one node at a time by the log-likelihood that it gives to the other answers: what has
    flipped already counts no more, so that no kind of prompt is left out."""
    contrast = Contrast(prompts.answers(run(subject, prompts.ids, {})), others)

    def likelihood(nodes: Sequence[tuple[str, int]]) -> float:
        changed = run(subject, prompts.ids, held_at(means, nodes))
        return -float(torch.nn.functional.softplus(contrast.log_odds(prompts.final(changed))).mean())

    best: list[tuple[str, int]] = []
    for _ in range(min(top, len(candidates))):
        best.append(max((one for one in candidates if one not in best), key=lambda one: likelihood([*best, one])))
    return best


def held_at(means: dict[str, Tensor], nodes: Sequence[tuple[str, int]]) -> dict[str, Held]:
    """The nodes held at `means`, by site."""
    chosen = {site: torch.tensor([node for where, node in nodes if where == site]) for site in {site for site, _ in nodes}}
    return {site: Held(numbers, means[site][numbers]) for site, numbers in chosen.items()}


def mean_activations(subject: Reconstruction, prompts: Prompts, around: dict[str, Tensor] | None = None) -> dict[str, Float[Tensor, "node"]]:
    """Mean activation of every node over real tokens; with `around`, mean absolute distance from those values instead."""
    found = subject.trace(prompts.ids)
    out = {}
    for name, part in subject.basis.items():
        a = activations(part, found.sites[name])[prompts.real]
        out[name] = a.mean(0) if around is None else (a - around[name]).abs().mean(0)
    return out


def rank(subject: Reconstruction, prompts: Prompts, means: dict[str, Tensor], slopes: dict[str, Tensor]) -> dict[str, Float[Tensor, "node"]]:
    """First-order effect on the log-odds of every node's excess over `means`, a prompt."""
    found = subject.trace(prompts.ids)
    out = {}
    for name, part in subject.basis.items():
        excess = (activations(part, found.sites[name]) - means[name]) * prompts.real[..., None]
        out[name] = (excess * (slopes[name] @ part.writes.T)).sum((0, 1)) / len(prompts.last)
    return out


def effect(
    subject: Reconstruction, prompts: Prompts, means: dict[str, Tensor], others: Tensor, nodes: Sequence[tuple[str, int]]
) -> tuple[float, float]:
    """(share of answers that change, log-odds lost) when nodes are held at `means`."""
    plain = run(subject, prompts.ids, {})
    contrast = Contrast(prompts.answers(plain), others)
    changed = run(subject, prompts.ids, held_at(means, nodes))
    cost = contrast.log_odds(prompts.final(plain)) - contrast.log_odds(prompts.final(changed))
    return float((prompts.answers(changed) != contrast.answers).float().mean()), float(cost.mean())


def matched(
    subject: Reconstruction, moved: dict[str, Tensor], nodes: Sequence[tuple[str, int]], generator: torch.Generator, near: int = 12
) -> list[tuple[str, int]]:
    """For each node another one of its site, drawn among the `near` whose holding moves what the site writes by the most similar amount."""
    out: list[tuple[str, int]] = []
    for site, node in nodes:
        size = moved[site] * subject.basis[site].writes.norm(dim=1)
        distance = (size.clamp_min(1e-12).log() - size[node].clamp_min(1e-12).log()).abs()
        for where, taken in [*nodes, *out]:
            if where == site:
                distance[taken] = torch.inf
        close = distance.argsort()[: min(near, int(distance.isfinite().sum()))]
        if not len(close):
            raise ValueError(f"{site} has no other nodes to draw a control from: hold fewer nodes together (--top)")
        out.append((site, int(close[torch.randint(len(close), (1,), generator=generator)])))
    return out
