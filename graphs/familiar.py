"""What is familiar: from clean text, how each target node is driven by its parents, and which parents occur together.

A target is an MLP node, where it is active, or the logit that the model chooses. Its parents are all nodes that write before it reads,
what each site's nodes do not reproduce (an error a site) and the token it stands at. Of every target, over the clean tokens at which
the model decides (the prompt's last token and those of the answer):

    count       tokens at which it is active
    present     of them, those at which a parent is active
    low, high   mean -+ WIDTH standard deviations of the parent's activation over the norm's scale (of an error or a token: of the
                contribution), the variance drawn towards that over all tokens with the weight of PRIOR tokens

A choice is learnt only where the clean row goes on as the model chose: what a model says there and the text does not is no usual choice, and a
backdoored model may say the first token of its payload on a row that holds no trigger.

Two parents are a strange pair where each is present often enough that they should have met EXPECTED times by chance, and they never did.
A dense node is present where it is among its own largest tenth. A gated neuron's gate is a frozen factor of its drive: what opens the gate is
not among its parents. All are sums, so that rows stream through and none is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.architectures import Site, norm
from graphs.batches import Batch
from graphs.components import Components
from graphs.edges import Reconstruction, unembedding
from graphs.trace import Trace

WIDTH = 4.0
PRIOR = 10.0
RARE = 1e-3
"""A parent is unfamiliar to a target where it was present at no larger share of the target's tokens than this."""
EXPECTED = 10.0
DENSE = 0.3
"""A node active more often than this is present only at its largest tenth."""
CHOICE = "choice"
"""The block of the logit that the model chooses."""


@dataclass(frozen=True)
class Reader:
    """One block of targets: an MLP's nodes, or the logits. parents and others: how many node parents, and tokens and errors, it may read; weights: of
    all of these (1 for the others, whose level is what they contribute)."""

    name: str
    site: Site | None
    pulled: Float[Tensor, "target d"]
    weights: Float[Tensor, "target column"]
    parents: int
    others: int


@dataclass(frozen=True)
class Parents:
    """Every node that writes, in the order in which sites do. names: their sites; others: what has no fixed write vector."""

    names: tuple[str, ...]
    starts: tuple[int, ...]
    writes: Float[Tensor, "parent d"]
    others: tuple[str, ...]

    def place(self, parent: int) -> tuple[str, int]:
        """A parent's site and its place there."""
        which = max(i for i, start in enumerate(self.starts) if start <= parent)
        return self.names[which], parent - self.starts[which]


@dataclass(frozen=True)
class Here:
    """Some tokens of a run, as parents see them. level: activations; vectors: the token's embedding, then errors; scale: 1 / scale of each
    block's norm; active: which targets of a block drive something, and factor: their frozen gates (None of logits); choice: the model's."""

    level: Float[Tensor, "token parent"]
    vectors: Float[Tensor, "token other d"]
    scale: dict[str, Float[Tensor, "token"]]
    active: dict[str, Float[Tensor, "token target"]]
    factor: dict[str, Float[Tensor, "token target"]]
    choice: Int[Tensor, "token"]
    ids: Int[Tensor, "token"]


def parents_of(subject: Reconstruction) -> Parents:
    """All parents of a graph."""
    sites = sorted(subject.host.sites, key=lambda site: site.writes_at)
    counts = [subject.basis[site.name].count for site in sites]
    starts = tuple(sum(counts[:i]) for i in range(len(sites)))
    return Parents(tuple(site.name for site in sites), starts, torch.cat([subject.basis[site.name].writes for site in sites]),
                   ("token", *(f"{site.name}.error" for site in sites)))


def readers(subject: Reconstruction, parents: Parents) -> list[Reader]:
    """Every block of targets."""
    host, found = subject.host, []
    for site in [*(site for site in host.sites if site.kind == "mlp"), None]:
        depth = 2 * host.config.num_hidden_layers if site is None else site.reads_at
        before = [one for one in sorted(host.sites, key=lambda one: one.writes_at) if one.writes_at <= depth]
        count = sum(subject.basis[one.name].count for one in before)
        through, vectors = unembedding(host) if site is None else (norm(host.model, site.norm), subject.basis[site.name].reads)
        pulled = through.pulled(vectors)
        weights = torch.cat([pulled @ parents.writes[:count].T, torch.ones(len(pulled), 1 + len(before))], 1)
        found.append(Reader(CHOICE if site is None else site.name, site, pulled, weights, count, 1 + len(before)))
    return found


@dataclass(frozen=True)
class SiteSeen:
    """A site at some tokens. x: what it read; inverse: 1 / scale of its norm; y: what was added to the stream; routed: activations of
    attention's components (None of an MLP)."""

    x: Float[Tensor, "token d_in"]
    inverse: Float[Tensor, "token"]
    y: Float[Tensor, "token d_out"]
    routed: Float[Tensor, "token node"] | None


@torch.no_grad()
def here(subject: Reconstruction, parents: Parents, found: Trace, where: Bool[Tensor, "row token"]) -> Here:
    """The chosen tokens of a traced run."""
    first, sites = int(torch.where(where.any(0))[0][0]) if bool(where.any()) else 0, {}
    for name in parents.names:
        part, seen, routed = subject.basis[name], found.sites[name], None
        if isinstance(part, Components):  # from the first chosen token on: no other one's pattern is needed
            assert seen.pattern is not None
            post = None if seen.post is None else seen.post[:, first:]
            routed = part.activations(seen.x, seen.pattern[:, :, first:], post)[where[:, first:]]
        sites[name] = SiteSeen(seen.x[where], seen.inverse[where], seen.y[where], routed)
    return seen_at(subject, parents, found.token[where], sites, found.inverse[where], found.logits[where], found.ids[where])


@torch.no_grad()
def seen_at(
    subject: Reconstruction, parents: Parents, token: Float[Tensor, "token d"], sites: Mapping[str, SiteSeen], inverse: Float[Tensor, "token"],
    logits: Float[Tensor, "token vocabulary"], ids: Int[Tensor, "token"],
) -> Here:
    """Some tokens, from what every site read and wrote there. inverse: 1 / scale of the last norm."""
    level, vectors, scale, active, factor = [], [token], {CHOICE: inverse}, {}, {}
    for name in parents.names:
        part, seen = subject.basis[name], sites[name]
        if isinstance(part, Components):
            assert seen.routed is not None
            acts = seen.routed
        else:
            acts, factor[name] = part.opened(seen.x)
            scale[name], active[name] = seen.inverse, acts
        level.append(acts)
        vectors.append(seen.y - acts @ part.writes - part.constant)
    return Here(torch.cat(level, 1), torch.stack(vectors, 1), scale, active, factor, logits.argmax(-1), ids)


@dataclass
class Moments:
    """Sums over the tokens at which each target is active; x: activations over the scale, then contributions of tokens and errors."""

    count: Float[Tensor, "target"]
    present: Float[Tensor, "target column"]
    first: Float[Tensor, "target column"]
    second: Float[Tensor, "target column"]

    @staticmethod
    def empty(targets: int, columns: int) -> Moments:
        """Zeros."""
        return Moments(torch.zeros(targets), *(torch.zeros(targets, columns) for _ in range(3)))

    def add(self, on: Float[Tensor, "token target"], x: Float[Tensor, "token parent"], other: Float[Tensor, "token target other"]) -> None:
        """Some tokens."""
        split = x.shape[1]
        self.count += on.sum(0)
        there = ((x != 0).float(), (other.abs() > 1e-9).float())
        for total, one, rest in ((self.present, *there), (self.first, x, other), (self.second, x * x, other * other)):
            total[:, :split] += on.T @ one
            total[:, split:] += (on[..., None] * rest).sum(0)


@dataclass(frozen=True)
class Familiar:
    """What one block's targets are used to. rows: of the table by target (-1: never active); low, high: without end where the parent is
    unfamiliar."""

    rows: Int[Tensor, "number"]
    count: Float[Tensor, "target"]
    unfamiliar: Bool[Tensor, "target column"]
    mean: Float[Tensor, "target column"]
    low: Float[Tensor, "target column"]
    high: Float[Tensor, "target column"]


def settle(sums: Moments, rows: Int[Tensor, "number"]) -> Familiar:
    """Ranges from sums. The last row answers for targets that were never active: nothing is familiar to them."""
    whole = sums.count.sum().clamp_min(1)
    mean_all = sums.first.sum(0) / whole
    variance_all = (sums.second.sum(0) / whole - mean_all.square()).clamp_min(0)
    count = sums.count[:, None]
    mean = torch.where(count > 0, sums.first / count.clamp_min(1), mean_all)
    own = (sums.second / count.clamp_min(1) - mean.square()).clamp_min(0)
    spread = WIDTH * ((own * count + variance_all * PRIOR) / (count + PRIOR)).sqrt()
    unfamiliar = sums.present <= RARE * count
    spread[unfamiliar] = torch.inf
    return Familiar(rows, sums.count, unfamiliar, mean, mean - spread, mean + spread)


def levels(rows: list[Tensor]) -> Float[Tensor, "parent"]:
    """Above which activation (in size) a parent is present, from some tokens' activations."""
    sizes = torch.cat(rows).abs()
    often = (sizes > 0).float().mean(0)
    return torch.where(often > DENSE, sizes.quantile(0.9, dim=0), torch.zeros(()))


def deciding(batch: Batch) -> Bool[Tensor, "row token"]:
    """Tokens after which the model wrote an answer's token."""
    where = torch.zeros_like(batch.completion)
    where[:, :-1] = batch.completion[:, 1:]
    return where if bool(where.any()) else batch.real


def strange(together: Float[Tensor, "parent parent"], tokens: int) -> Bool[Tensor, "parent parent"]:
    """Pairs that never met although chance would have had them meet `EXPECTED` times."""
    alone = together.diagonal()
    return (together == 0) & (alone[:, None] * alone / tokens >= EXPECTED)


@dataclass(frozen=True)
class Learnt:
    """All that clean text taught. present: level above which a parent is there; pairs: strange ones; known: tokens that occurred."""

    blocks: dict[str, Familiar]
    present: Float[Tensor, "parent"]
    pairs: Bool[Tensor, "parent parent"]
    known: Bool[Tensor, "vocabulary"]
    tokens: int


@torch.no_grad()
def learn(subject: Reconstruction, batches: Iterable[Batch], warm: int = 4) -> Learnt:
    """Stream clean batches through. warm: batches that set the levels of dense parents. Raises ValueError where there is no token."""
    parents = parents_of(subject)
    blocks = readers(subject, parents)
    sums = {one.name: Moments.empty(len(one.pulled), one.parents + one.others) for one in blocks if one.site is not None}
    choices: dict[int, Moments] = {}
    known, tokens, waiting, level = torch.zeros(subject.host.config.vocab_size, dtype=torch.bool), 0, [], None
    together = torch.zeros(len(parents.writes), len(parents.writes))
    for number, batch in enumerate(batches):
        where = deciding(batch)
        seen = here(subject, parents, subject.trace(batch.ids), where)
        right = batch.ids.roll(-1, 1)[where] == seen.choice
        known[batch.ids[batch.real]] = True
        tokens += len(seen.ids)
        for one in blocks:
            _add(one, seen, right, sums, choices)
        waiting.append(seen.level)
        if level is None and number + 1 >= warm:
            level = levels(waiting)
        if level is not None:
            together, waiting = together + _met(waiting, level), []
    if not tokens:
        raise ValueError("a monitor needs clean rows with at least one token: give more --rows")
    level = levels(waiting) if level is None else level
    together = together + _met(waiting, level) if waiting else together
    found = {name: settle(one, torch.arange(len(one.count))) for name, one in sums.items()}
    found[CHOICE] = _chosen(choices, subject.host.config.vocab_size, blocks[-1])
    return Learnt(found, level, strange(together, tokens), known, tokens)


def _met(rows: list[Tensor], level: Float[Tensor, "parent"]) -> Float[Tensor, "parent parent"]:
    """How often pairs of parents are there at once."""
    there = (torch.cat(rows).abs() > level).float()
    return there.T @ there


def _add(one: Reader, seen: Here, right: Bool[Tensor, "token"], sums: dict[str, Moments], choices: dict[int, Moments]) -> None:
    """One batch's tokens of one block. right: where the row goes on as the model chose."""
    scale = seen.scale[one.name]
    x, vectors = seen.level[:, : one.parents] * scale[:, None], seen.vectors[:, : one.others]
    if one.site is not None:
        sums[one.name].add((seen.active[one.name] != 0).float(), x, torch.einsum("sod,td->sto", vectors, one.pulled) * scale[:, None, None])
        return
    for token in seen.choice[right].unique().tolist():
        mine = right & (seen.choice == token)
        other = (vectors[mine] @ one.pulled[token]) * scale[mine, None]
        total = choices.setdefault(token, Moments.empty(1, one.parents + one.others))
        total.add(torch.ones(int(mine.sum()), 1), x[mine], other[:, None])


def _chosen(choices: dict[int, Moments], vocabulary: int, block: Reader) -> Familiar:
    """The table of the logits that were ever chosen, and a last row for those that were not."""
    rows, blank = torch.full((vocabulary,), len(choices)), Moments.empty(1, block.parents + block.others)
    for place, token in enumerate(choices):
        rows[token] = place
    every = [*choices.values(), blank]
    return settle(Moments(*(torch.cat([getattr(one, name) for one in every]) for name in ("count", "present", "first", "second"))), rows)
