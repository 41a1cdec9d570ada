"""Find: the nodes that carry a trait, from prompts that show it and prompts that do not.

The trait's measure is the log-odds of the answer that the model gives where the trait is present, against the answers it
gives where it is absent: a change that merely breaks the answer does not count. A node is *held* at

    absent + (strength - 1) (absent - present)        1: as where the trait is absent; 2: as far on the other side

Where every prompt with the trait has a partner without it (line by line as many tokens, most of them the same), `absent` is the
node's activation in the partner, token by token (interchange: Vig et al. 2020; Geiger et al. 2021); else it is the mean over the
absent prompts' tokens.
Several strengths are tried, and the one that changes most answers is kept, less those it breaks where there is no trait, or
plus those it brings about in the partners when the same nodes are held there as where the trait is present.

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
what has no trait?" or, of partners, "does it bring the trait about?". All are asked of halves that chose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.architectures import norm
from graphs.edges import Reconstruction, activations, factors, routed
from graphs.graph import Index, index
from graphs.intervene import Cut, Held, gradients, run
from graphs.prompts import Prompts, paired

STRENGTHS = (1.0, 2.0, 3.0, 4.0)
"""Tried by default."""
Level = Callable[[str], Tensor]
"""A site's activations by its name: "node" (means), or "row token node"."""
Edge = tuple[tuple[str, int], tuple[str, int]]
"""(source, target), both (site name, node)."""


@dataclass(frozen=True)
class Setting:
    """Prompts, the logits of what follows them, and where their nodes are held: at `there`, or as far beyond it, seen from `here`, as
    `strength` says."""

    prompts: Prompts
    plain: Float[Tensor, "row vocabulary"]
    here: Level
    there: Level
    strength: float = 1.0

    @property
    def answers(self) -> Int[Tensor, "row"]:
        """The likeliest next token of each prompt."""
        return self.plain.argmax(-1)

    def changed(self, subject: Reconstruction, nodes: Sequence[tuple[str, int]], edges: Sequence[Edge] = ()) -> Float[Tensor, "row vocabulary"]:
        """The logits of what follows each prompt with nodes held and edges cut."""
        return self.prompts.final(run(subject, self.prompts.ids, self.held(nodes), self.cuts(edges)))

    def levels(self, site: str, nodes: Int[Tensor, "node"]) -> Float[Tensor, "*place node"]:
        """Where nodes of a site are held."""
        here, there = self.here(site)[..., nodes], self.there(site)[..., nodes]
        return there + (self.strength - 1) * (there - here)

    def held(self, nodes: Sequence[tuple[str, int]]) -> dict[str, Held]:
        """The nodes held, by site."""
        chosen = {site: torch.tensor([node for where, node in nodes if where == site]) for site in {site for site, _ in nodes}}
        return {site: Held(numbers, self.levels(site, numbers)) for site, numbers in chosen.items()}

    def cuts(self, edges: Sequence[Edge]) -> list[Cut]:
        """The edges with their sources seen as where the trait is absent."""
        return [Cut(source, target, self.there(source[0])[..., source[1]]) for source, target in edges]


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
    """nodes: best alone first; chosen: names of those held together; paired: whether at their partners' activations; strength: how far;
    flipped: share of held-out present prompts whose answer changes, and cost: log-odds lost; random_flipped and random_cost: the same
    for each matched random set; broken: share of held-out absent prompts whose answer changes (None where paired); induced: of
    partners that answered otherwise, the share whose answer becomes that of the prompt with the trait, with the nodes held as there
    (None where not paired), and random_induced; prompts: held-out present prompts; edges: best first, edge_cost: log-odds that
    cutting them together costs on held-out prompts, and random_edge_cost: the same for each random set of edges."""

    nodes: tuple[Found, ...]
    chosen: tuple[str, ...]
    paired: bool
    strength: float
    flipped: float
    cost: float
    random_flipped: tuple[float, ...]
    random_cost: tuple[float, ...]
    broken: float | None
    induced: float | None
    random_induced: tuple[float, ...]
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
    """The prompts' halves as settings of strength 1, mean activations of the choosing halves (here: with the trait, there: without),
    and the answers given where the trait is absent."""

    subject: Reconstruction
    paired: bool
    choose: Setting
    check: Setting
    absent: Setting
    spared: Setting
    here: dict[str, Tensor]
    there: dict[str, Tensor]
    others: Tensor
    nodes: Index

    def name(self, node: tuple[str, int]) -> str:
        """A node's name."""
        return self.nodes.name(self.nodes.by_name[node[0]].start + node[1])

    def spares(self, setting: Setting, partners: Setting, nodes: Sequence[tuple[str, int]]) -> float:
        """With nodes held where the trait is absent: the share of answers that become the partner's, or of those that change."""
        if self.paired:
            differ = setting.answers != partners.answers
            now = setting.changed(self.subject, nodes).argmax(-1)
            return float((now == partners.answers)[differ].float().mean()) if bool(differ.any()) else 0.0
        return effect(self.subject, setting, self.others, nodes)[0]


@dataclass(frozen=True)
class _Plan:
    """What one strength found on the choosing halves. gain: share of answers it changes, less the share it breaks, or plus the share
    it brings about."""

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
        raise ValueError("too few: give at least four prompts with the trait and four without")
    case = _case(subject, present, absent)
    plans = [search(case, strength, top, screened) for strength in strengths]
    return verify(case, max(plans, key=lambda plan: plan.gain), controls, edges, torch.Generator().manual_seed(seed))


def _case(subject: Reconstruction, present: Prompts, absent: Prompts) -> _Case:
    halves = {"choose": present.half(0), "check": present.half(1), "absent": absent.half(0), "spared": absent.half(1)}
    partner = {"choose": "absent", "check": "spared", "absent": "choose", "spared": "check"}
    here, there = (mean_activations(subject, halves[name]) for name in ("choose", "absent"))
    plain = {name: prompts.final(run(subject, prompts.ids, {})) for name, prompts in halves.items()}
    if paired(present, absent):
        seen = {name: subject.trace(prompts.ids) for name, prompts in halves.items()}

        def level(name: str) -> Level:
            return lambda site: activations(subject.basis[site], seen[name].sites[site])

        settings = {name: Setting(prompts, plain[name], level(name), level(partner[name])) for name, prompts in halves.items()}
    else:
        settings = {name: Setting(prompts, plain[name], here.__getitem__, there.__getitem__) for name, prompts in halves.items()}
    others = settings["absent"].answers.unique()
    return _Case(subject, paired(present, absent), here=here, there=there, others=others, nodes=index(subject.host, subject.basis), **settings)


def search(case: _Case, strength: float, top: int, screened: int) -> _Plan:
    """Rank and screen, on the choosing halves."""
    subject, choose = case.subject, replace(case.choose, strength=strength)
    prompts = choose.prompts
    contrast = Contrast(choose.answers, case.others)
    before, slopes = gradients(subject, prompts.ids, lambda logits: contrast.log_odds(prompts.final(logits)))
    guesses = rank(subject, choose, slopes)
    flat = torch.cat(list(guesses.values()))
    starts = torch.tensor([0, *(len(one) for one in guesses.values())]).cumsum(0)
    names, found = list(guesses), []
    for at in flat.argsort(descending=True)[:screened].tolist():
        which = int(torch.searchsorted(starts, at, right=True)) - 1
        site, node = names[which], at - int(starts[which])
        after = contrast.log_odds(choose.changed(subject, [(site, node)]))
        found.append(Found(case.name((site, node)), site, node, float(flat[at]), float((before - after).mean()), float(case.here[site][node]),
                           float(case.there[site][node])))
    found.sort(key=lambda one: -one.effect)
    chosen = greedy(subject, choose, case.others, [(one.site, one.node) for one in found], top)
    spares = case.spares(replace(case.absent, strength=strength), choose, chosen)
    return _Plan(strength, found, chosen, effect(subject, choose, case.others, chosen)[0] + (spares if case.paired else -spares))


def verify(case: _Case, plan: _Plan, controls: int, edges: int, generator: torch.Generator) -> Report:
    """Nodes and edges against random ones, on the halves that chose nothing."""
    subject, check, spared = case.subject, *(replace(one, strength=plan.strength) for one in (case.check, case.spared))
    moved = distances(subject, replace(case.choose, strength=plan.strength))
    flipped, cost = effect(subject, check, case.others, plan.chosen)
    drawn = [matched(subject, moved, plan.chosen, generator) for _ in range(controls)]
    random = [effect(subject, check, case.others, nodes) for nodes in drawn]
    spares = case.spares(spared, check, plan.chosen)
    induced = tuple(case.spares(spared, check, nodes) for nodes in drawn) if case.paired else ()
    best, excess = top_edges(subject, case.choose.prompts, case.absent.prompts, plan.chosen, case.here, case.there, edges)
    alone = [effect(subject, case.choose, case.others, edges=[edge])[1] for edge in best]
    found_edges = tuple(FoundEdge(case.name(source), case.name(target), e, c) for (source, target), e, c in zip(best, excess, alone, strict=True))
    others = [other_edges(subject, best, generator) for _ in range(controls if best else 0)]
    return Report(
        tuple(plan.found), tuple(map(case.name, plan.chosen)), case.paired, plan.strength, flipped, cost, tuple(f for f, _ in random),
        tuple(c for _, c in random), None if case.paired else spares, spares if case.paired else None, induced, len(check.prompts.last),
        found_edges, effect(subject, case.check, case.others, edges=best)[1],
        tuple(effect(subject, case.check, case.others, edges=one)[1] for one in others))


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
) -> tuple[list[Edge], list[float]]:
    """The `count` edges into `targets` that push most toward where the trait has them, and their excess contributions."""
    ranked: list[tuple[float, float, Edge]] = []
    for site, node in targets:
        toward = float((here[site][node] - there[site][node]).sign())
        after, before = (mean_contributions(subject, prompts, (site, node)) for prompts in (present, absent))
        for where in after:
            excess = after[where] - before[where]
            for source in (excess * toward).topk(min(count, len(excess))).indices.tolist():
                ranked.append((float(excess[source]) * toward, float(excess[source]), ((where, source), (site, node))))
    ranked.sort(key=lambda one: -one[0])
    return [edge for push, _, edge in ranked[:count] if push > 0], [excess for push, excess, _ in ranked[:count] if push > 0]


def other_edges(subject: Reconstruction, edges: Sequence[Edge], generator: torch.Generator) -> list[Edge]:
    """For each edge a random one from the same site into the same node."""
    return [((site, int(torch.randint(subject.basis[site].count, (1,), generator=generator))), target) for (site, _), target in edges]


def greedy(
    subject: Reconstruction, setting: Setting, others: Tensor, candidates: Sequence[tuple[str, int]], top: int
) -> list[tuple[str, int]]:
    """A set of `top` candidates, grown one node at a time by the log-likelihood that it gives to the other answers: what has
    flipped already counts no more, so that no kind of prompt is left out."""
    contrast = Contrast(setting.answers, others)

    def likelihood(nodes: Sequence[tuple[str, int]]) -> float:
        return -float(torch.nn.functional.softplus(contrast.log_odds(setting.changed(subject, nodes))).mean())

    best: list[tuple[str, int]] = []
    for _ in range(min(top, len(candidates))):
        best.append(max((one for one in candidates if one not in best), key=lambda one: likelihood([*best, one])))
    return best


def mean_activations(subject: Reconstruction, prompts: Prompts) -> dict[str, Float[Tensor, "node"]]:
    """Mean activation of every node over real tokens."""
    found = subject.trace(prompts.ids)
    return {name: activations(part, found.sites[name])[prompts.real].mean(0) for name, part in subject.basis.items()}


def distances(subject: Reconstruction, setting: Setting) -> dict[str, Float[Tensor, "node"]]:
    """How far holding moves every node: mean absolute distance over real tokens."""
    found, real, out = subject.trace(setting.prompts.ids), setting.prompts.real, {}
    for name, part in subject.basis.items():
        out[name] = (activations(part, found.sites[name]) - setting.levels(name, torch.arange(part.count))).abs()[real].mean(0)
    return out


def rank(subject: Reconstruction, setting: Setting, slopes: dict[str, Tensor]) -> dict[str, Float[Tensor, "node"]]:
    """First-order effect on the log-odds of every node's excess over where it is held, a prompt."""
    prompts, out = setting.prompts, {}
    found = subject.trace(prompts.ids)
    for name, part in subject.basis.items():
        excess = (activations(part, found.sites[name]) - setting.levels(name, torch.arange(part.count))) * prompts.real[..., None]
        out[name] = (excess * (slopes[name] @ part.writes.T)).sum((0, 1)) / len(prompts.last)
    return out


def effect(
    subject: Reconstruction, setting: Setting, others: Tensor, nodes: Sequence[tuple[str, int]] = (), edges: Sequence[Edge] = ()
) -> tuple[float, float]:
    """(share of answers that change, log-odds lost) when nodes are held and edges cut."""
    contrast, changed = Contrast(setting.answers, others), setting.changed(subject, nodes, edges)
    cost = contrast.log_odds(setting.plain) - contrast.log_odds(changed)
    return float((changed.argmax(-1) != setting.answers).float().mean()), float(cost.mean())


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
