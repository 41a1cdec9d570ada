"""Find: the nodes that carry a trait, from prompts that show it and prompts that do not.

The trait's measure is the log-odds of the answer that the model gives where the trait is present, against the answers it
gives where it is absent: a change that merely breaks the answer does not count. A node is *held* at

    mean_absent + (strength - 1) (mean_absent - mean_present)        1: as where the trait is absent; 2: as far on the other side

1. *Rank*, on half of the present prompts: to first order, what moving each node there takes from the log-odds, sum_t (a(t) -
   held) d log-odds / d a(t) (attribution patching: Nanda 2023; Syed et al. 2023).
2. *Screen.* The best `screened` are held one at a time and ranked anew by what that really costs, since a first-order guess can
   be far off; then the set that costs most together is grown one node at a time.
3. *Verify*, on the other half of the present prompts, which chose nothing: how many first answer tokens change with the top
   nodes held, and how many with random nodes of the same sites whose holding moves what the site writes by as much.

The control answers "would any change of this size do?"; the absent prompts, with the same nodes held, answer "does it break
what has no trait?".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.edges import Reconstruction, activations, writes
from graphs.graph import index
from graphs.intervene import Held, gradients, run
from graphs.trace import trace


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
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Prompts(ids, torch.arange(width)[None] < lengths[:, None], lengths - 1)


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
class Report:
    """nodes: best alone first; chosen: names of those held together; flipped: share of held-out present prompts whose answer changes, and
    cost: log-odds lost; random_flipped and random_cost: the same for each matched random set; broken: share of absent prompts
    whose answer changes; prompts: held-out prompts."""

    nodes: tuple[Found, ...]
    chosen: tuple[str, ...]
    flipped: float
    cost: float
    random_flipped: tuple[float, ...]
    random_cost: tuple[float, ...]
    broken: float
    prompts: int

    @property
    def p_value(self) -> float:
        """Chance of a random set that flips as many (counting this one: Phipson and Smyth 2010)."""
        return (1 + sum(one >= self.flipped for one in self.random_flipped)) / (1 + len(self.random_flipped))


@torch.no_grad()
def find(
    subject: Reconstruction, present: Prompts, absent: Prompts, top: int = 5, strength: float = 2.0, screened: int = 60, controls: int = 20,
    seed: int = 0,
) -> Report:
    """Rank, screen, verify. Raises ValueError where there are too few prompts."""
    if len(present.last) < 4 or len(absent.last) < 2:
        raise ValueError("give at least four prompts with the trait and two without")
    choose, check = present.half(0), present.half(1)
    here, there = mean_activations(subject, choose), mean_activations(subject, absent)
    means = {name: there[name] + (strength - 1) * (there[name] - here[name]) for name in there}
    moved = mean_activations(subject, choose, means)
    others = absent.answers(run(subject, absent.ids, {})).unique()
    contrast = Contrast(choose.answers(run(subject, choose.ids, {})), others)
    before, slopes = gradients(subject, choose.ids, lambda logits: contrast.log_odds(choose.final(logits)))
    guesses = rank(subject, choose, means, slopes)
    flat = torch.cat(list(guesses.values()))
    starts = torch.tensor([0, *(len(one) for one in guesses.values())]).cumsum(0)
    names, nodes = list(guesses), index(subject.host, subject.basis)
    found = []
    for at in flat.argsort(descending=True)[:screened].tolist():
        which = int(torch.searchsorted(starts, at, right=True)) - 1
        site, node = names[which], at - int(starts[which])
        held = {site: Held(torch.tensor([node]), means[site][node][None])}
        cost = float((before - contrast.log_odds(choose.final(run(subject, choose.ids, held)))).mean())
        name = nodes.name(nodes.by_name[site].start + node)
        found.append(Found(name, site, node, float(flat[at]), cost, float(here[site][node]), float(there[site][node])))
    found.sort(key=lambda one: -one.effect)
    called = {(one.site, one.node): one.name for one in found}
    best = greedy(subject, choose, means, others, [(one.site, one.node) for one in found], top)
    flipped, cost = effect(subject, check, means, others, best)
    generator = torch.Generator().manual_seed(seed)
    random = [effect(subject, check, means, others, matched(subject, moved, best, generator)) for _ in range(controls)]
    broken, _ = effect(subject, absent, means, others, best)
    return Report(tuple(found), tuple(called[one] for one in best), flipped, cost, tuple(f for f, _ in random), tuple(c for _, c in random), broken,
                  len(check.last))


def greedy(
    subject: Reconstruction, prompts: Prompts, means: dict[str, Tensor], others: Tensor, candidates: Sequence[tuple[str, int]], top: int
) -> list[tuple[str, int]]:
    """The set of `top` candidates that costs most when held together, one node at a time."""
    best: list[tuple[str, int]] = []
    for _ in range(min(top, len(candidates))):
        best.append(max((one for one in candidates if one not in best), key=lambda one: effect(subject, prompts, means, others, [*best, one])[1]))
    return best


def mean_activations(subject: Reconstruction, prompts: Prompts, around: dict[str, Tensor] | None = None) -> dict[str, Float[Tensor, "node"]]:
    """Mean activation of every node over real tokens; with `around`, mean absolute distance from those values instead."""
    found = trace(subject.host, prompts.ids, subject.stand_ins)
    out = {}
    for name, part in subject.basis.items():
        a = activations(part, found.sites[name])[prompts.real]
        out[name] = a.mean(0) if around is None else (a - around[name]).abs().mean(0)
    return out


def rank(subject: Reconstruction, prompts: Prompts, means: dict[str, Tensor], slopes: dict[str, Tensor]) -> dict[str, Float[Tensor, "node"]]:
    """First-order effect on the log-odds of every node's excess over `means`, a prompt."""
    found = trace(subject.host, prompts.ids, subject.stand_ins)
    out = {}
    for name, part in subject.basis.items():
        excess = (activations(part, found.sites[name]) - means[name]) * prompts.real[..., None]
        out[name] = (excess * (slopes[name] @ writes(part).T)).sum((0, 1)) / len(prompts.last)
    return out


def effect(
    subject: Reconstruction, prompts: Prompts, means: dict[str, Tensor], others: Tensor, nodes: Sequence[tuple[str, int]]
) -> tuple[float, float]:
    """(share of answers that change, log-odds lost) when nodes are held at `means`."""
    plain = run(subject, prompts.ids, {})
    contrast = Contrast(prompts.answers(plain), others)
    held = {site: torch.tensor([node for where, node in nodes if where == site]) for site in {site for site, _ in nodes}}
    changed = run(subject, prompts.ids, {site: Held(chosen, means[site][chosen]) for site, chosen in held.items()})
    cost = contrast.log_odds(prompts.final(plain)) - contrast.log_odds(prompts.final(changed))
    return float((prompts.answers(changed) != contrast.answers).float().mean()), float(cost.mean())


def matched(
    subject: Reconstruction, moved: dict[str, Tensor], nodes: Sequence[tuple[str, int]], generator: torch.Generator, near: int = 12
) -> list[tuple[str, int]]:
    """For each node another one of its site, drawn among the `near` whose holding moves what the site writes by the most similar amount."""
    out: list[tuple[str, int]] = []
    for site, node in nodes:
        size = moved[site] * writes(subject.basis[site]).norm(dim=1)
        distance = (size.clamp_min(1e-12).log() - size[node].clamp_min(1e-12).log()).abs()
        for where, taken in [*nodes, *out]:
            if where == site:
                distance[taken] = torch.inf
        close = distance.argsort()[:near]
        out.append((site, int(close[torch.randint(len(close), (1,), generator=generator)])))
    return out
