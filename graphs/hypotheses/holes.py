"""Holes: where what nobody explained sits.

A unit is what is unexplained of one site (kept nodes without a hypothesis), one head's pattern without an accepted look, or one site's
error; in a circuit, also all that lies between it and the original model (`output`). Its size is the KL that ablating it alone does to
the subject's own logits, everything else left as it is; a circuit's output: KL(model || circuit). Each is told apart by how long the
context is and by where in the text it strikes, with the places where it strikes hardest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.components import Components
from graphs.hypotheses.study import coded_heads
from graphs.hypotheses.substitution import Change, Looking, divergences, run, uniform
from graphs.hypotheses.understanding import BUCKETS, Explained, Prompts, bucketed
from graphs.hypotheses.views import Text
from graphs.intervene import Held

AROUND = 8
"""Tokens of an example before its place."""


@dataclass(frozen=True)
class Hole:
    """unit: what it is; nodes: how many; kl: nats a completion token; lengths: the same by bucket of context length (None: no token);
    kinds: states of the text that hold most of it, with their share; examples: (nats, text before the place, token that came)."""

    unit: str
    nodes: int
    kl: float
    lengths: dict[str, float | None]
    kinds: dict[str, float]
    examples: tuple[tuple[float, str, str], ...]


def holes(explained: Explained, prompts: Sequence[Prompts], most: int = 3) -> list[Hole]:
    """Every unit, the largest first."""
    own = [run(explained.subject, one.text.batch.ids, Change()) for one in prompts]
    found = []
    for unit, nodes, changes in _units(explained, [one.text for one in prompts]):
        kl = [divergences(run(explained.subject, one.text.batch.ids, change), target, one.text.batch)
              for one, target, change in zip(prompts, own, changes, strict=True)]
        found.append(_hole(unit, nodes, kl, prompts, most))
    if prompts[0].added:
        kl = [divergences(logits, one.target, one.text.batch) for one, logits in zip(prompts, own, strict=True)]
        found.append(_hole("output", 0, kl, prompts, most))
    return sorted(found, key=lambda hole: -hole.kl)


def _units(explained: Explained, texts: Sequence[Text]) -> Iterator[tuple[str, int, list[Change]]]:
    """Name, nodes, and the change on each batch that ablates the unit."""
    members, by_code = explained.members()["unexplained"], coded_heads(explained.accepted)
    for site, part in explained.subject.basis.items():
        nodes = members[site]
        if len(nodes):
            yield site, len(nodes), [Change(values={site: [Held(nodes, explained.means.nodes[site][nodes])]})] * len(texts)
        if isinstance(part, Components):
            layer = site.removesuffix(".attention")
            for head in range(len(part.write)):
                if head not in by_code.get(layer, []):
                    flat = [Looking(torch.tensor([head]), uniform(text)[:, None]) for text in texts]
                    yield f"{layer}.H{head} pattern", 1, [Change(looks={site: [one]}) for one in flat]
        if explained.subject.stand_ins:
            yield f"{site}.error", 1, [Change(errors={site: explained.means.errors[site]})] * len(texts)


def _hole(unit: str, nodes: int, kl: Sequence[Float[Tensor, "_row _token"]], prompts: Sequence[Prompts], most: int) -> Hole:
    texts = [one.text for one in prompts]
    counts = sum(bucketed(text.batch.completion.float().roll(-1, 1)).sum(0) for text in texts)
    sums = sum(bucketed(one).sum(0) for one in kl)
    names = [f"{start}+" for start in BUCKETS]
    lengths = {name: float(total / count) if count else None for name, total, count in zip(names, sums, counts, strict=True)}  # type: ignore
    kinds: dict[str, float] = {}
    places: list[tuple[float, str, str]] = []
    for text, values in zip(texts, kl, strict=True):
        keys, codes = text.keys("state")
        summed = torch.zeros(len(keys)).index_add(0, codes.flatten(), values.flatten())
        for key, value in zip(keys, summed.tolist(), strict=True):
            kinds[key] = kinds.get(key, 0.0) + value
        places += [_example(text, values, int(at)) for at in values.flatten().topk(min(most, values.numel())).indices]
    whole = sum(kinds.values())
    top = sorted(kinds.items(), key=lambda pair: -pair[1])[:most]
    return Hole(unit, nodes, whole / max(1, sum(int(text.batch.completion.sum()) for text in texts)), lengths,
                {key: value / max(whole, 1e-12) for key, value in top if value > 0}, tuple(sorted(places, key=lambda one: -one[0])[:most]))


def _example(text: Text, values: Float[Tensor, "row token"], at: int) -> tuple[float, str, str]:
    row, place = divmod(at, values.shape[1])
    said = text.texts[row]
    return float(values[row, place]), "".join(said[max(0, place + 1 - AROUND) : place + 1]), said[place + 1] if place + 1 < len(said) else ""
