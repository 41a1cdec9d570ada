"""Verdicts: a hypothesis is accepted or rejected by what it does in the place of what it is about, on rows that it was not made from.

Three runs of the same rows, KL to the subject's own logits on completion tokens, summed over rows: K with the hypothesis, K0 with its
target ablated (a node at its mean on clean tokens, a pattern uniform), Kn with the null control (`substitution.dealt`).

    recovered = 1 - K / K0        null = 1 - Kn / K0        both with a bootstrap interval over rows (95 %)

Accepted, by thresholds that were fixed before any was tested:

    recovered >= RECOVERED, and the lower end of its interval >= LOWER
    the null's upper end is below the lower end of recovered, and null <= NULL
    K0 >= FLOOR nats a token: an effect that is not there cannot be explained

`fit` says how close the values are (share of variance; of a pattern the mean overlap sum_j min), for readers: it decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.batches import Batch
from graphs.edges import Reconstruction, activations
from graphs.graph import Index
from graphs.hypotheses.hypothesis import Hypothesis, Look, Sum, read
from graphs.hypotheses.substitution import Change, Looking, Means, coded, compiled, dealt, divergences, head, joined, place, run, uniform
from graphs.hypotheses.views import Text
from graphs.intervene import Held
from graphs.trace import Trace

RECOVERED, LOWER, NULL, FLOOR = 0.8, 0.6, 0.2, 1e-6
RESAMPLES = 2000


@dataclass(frozen=True)
class Share:
    """A share with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """See the module. ablated: K0 in nats a token; null: None where the hypothesis failed before it; why: what it failed, or nothing."""

    fit: float
    ablated: float
    recovered: Share
    null: Share | None
    why: str = ""

    @property
    def accepted(self) -> bool:
        """Whether nothing failed."""
        return not self.why


@dataclass(frozen=True)
class Judged:
    """A hypothesis and what became of it."""

    hypothesis: Hypothesis
    evidence: Evidence

    def data(self) -> dict[str, Any]:
        """As JSON, with a line to read."""
        return {"line": self.hypothesis.line(), "numbers": self.hypothesis.rule.numbers, **self.hypothesis.data(), "evidence": asdict(self.evidence)}

    @staticmethod
    def read(data: Mapping[str, Any]) -> Judged:
        """The inverse of `data`."""
        found = dict(data["evidence"])
        shares = {name: None if found[name] is None else Share(**found[name]) for name in ("recovered", "null")}
        return Judged(read(data), Evidence(**found | shares))


@dataclass
class Bench:
    """A subject and the rows that it is judged on."""

    subject: Reconstruction
    nodes: Index
    means: Means
    texts: list[Text]
    traces: list[Trace]
    targets: list[Float[Tensor, "_row _token vocabulary"]]
    seed: int = 0

    @staticmethod
    @torch.no_grad()
    def of(subject: Reconstruction, nodes: Index, means: Means, batches: Sequence[Batch], seed: int = 0) -> Bench:
        """Run the subject on `batches` once; its own logits are the targets."""
        texts = [Text.of(batch, nodes.tokens) for batch in batches]
        return Bench(subject, nodes, means, texts, [subject.trace(batch.ids) for batch in batches],
                     [run(subject, batch.ids, Change()) for batch in batches], seed)

    def effect(self, changes: Sequence[Change]) -> Float[Tensor, "row"]:
        """KL of each row, summed over its completion, under one change a batch."""
        return torch.cat([divergences(run(self.subject, text.batch.ids, change), target, text.batch).sum(1)
                          for text, target, change in zip(self.texts, self.targets, changes, strict=True)])

    @property
    def tokens(self) -> int:
        """Completion tokens judged."""
        return sum(int(text.batch.completion.sum()) for text in self.texts)

    def ablation(self, target: str, look: bool) -> list[Change]:
        """The target gone: a pattern uniform, or nodes at their means."""
        site, numbers = place(self.nodes, target)
        if look:
            return [Change(looks={site: [Looking(torch.tensor([head(target)]), uniform(text)[:, None])]}) for text in self.texts]
        return [Change(values={site: [Held(numbers, self.means.nodes[site][numbers])]}) for _ in self.texts]


def judge(bench: Bench, one: Hypothesis, ablated: Float[Tensor, "row"] | None = None, control: bool = True) -> Judged:
    """Test one hypothesis. ablated: K0 by row, where it is known already; control: False leaves the null out."""
    zero = bench.effect(bench.ablation(one.target, isinstance(one.rule, Look))) if ablated is None else ablated
    size = float(zero.sum()) / bench.tokens
    placed = _placed(bench, one)
    with_it = bench.effect(_equations(bench, one) if isinstance(one.rule, Sum) else [joined([pair]) for pair in placed])
    recovered = share(with_it, zero, bench.seed)
    fit = _fit(bench, one, placed)
    why = _fails(size, recovered)
    if why or not control:
        return Judged(one, Evidence(fit, size, recovered, None, why))
    generator = torch.Generator().manual_seed(bench.seed)
    wrong = [joined([(site, dealt(what, text, generator))]) for (site, what), text in zip(placed, bench.texts, strict=True)]
    null = share(bench.effect(wrong), zero, bench.seed)
    why = "" if null.high < recovered.low and null.value <= NULL else f"the null control recovers {null.value:.2f}"
    return Judged(one, Evidence(fit, size, recovered, null, why))


def _fails(size: float, recovered: Share) -> str:
    if size < FLOOR:
        return f"ablating it moves {size:.1e} nats a token: too little to explain"
    if recovered.value < RECOVERED:
        return f"it recovers {recovered.value:.2f} of the ablated effect, less than {RECOVERED}"
    return f"the lower end of what it recovers is {recovered.low:.2f}, less than {LOWER}" if recovered.low < LOWER else ""


def share(kl: Float[Tensor, "row"], ablated: Float[Tensor, "row"], seed: int) -> Share:
    """1 - sum KL / sum ablated, with the percentile bootstrap over rows."""
    both = torch.stack([kl, ablated], 1).double()
    drawn = resampled(len(kl), seed) @ both
    ratios = 1 - drawn[:, 0] / drawn[:, 1].clamp_min(1e-30)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Share(1 - float(both[:, 0].sum() / both[:, 1].sum().clamp_min(1e-30)), low, high)


def resampled(rows: int, seed: int) -> Float[Tensor, "resample row"]:
    """How often each row is drawn in each bootstrap resample."""
    drawn = torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RESAMPLES, rows, dtype=torch.float64).scatter_add(1, drawn, torch.ones(RESAMPLES, rows, dtype=torch.float64))


def _equations(bench: Bench, one: Hypothesis) -> list[Change]:
    return [Change(equations=compiled(bench.nodes, bench.subject, [one]))] * len(bench.texts)


def _placed(bench: Bench, one: Hypothesis) -> list[tuple[str, Looking | Held]]:
    """What the hypothesis puts in place on each batch; of an equation, the values that it has in its own run."""
    if not isinstance(one.rule, Sum):
        return [coded(bench.nodes, text, one) for text in bench.texts]
    site, numbers = place(bench.nodes, one.target)
    found: list[tuple[str, Looking | Held]] = []
    for text, change in zip(bench.texts, _equations(bench, one), strict=True):
        values: dict[str, Tensor] = {}
        run(bench.subject, text.batch.ids, change, values)
        found.append((site, Held(numbers, values[site][..., numbers])))
    return found


def _fit(bench: Bench, one: Hypothesis, placed: Sequence[tuple[str, Looking | Held]]) -> float:
    """Share of variance, or overlap of a pattern."""
    own, guess = [], []
    for text, seen, (site, what) in zip(bench.texts, bench.traces, placed, strict=True):
        real, there = text.batch.real, seen.sites[site]
        if isinstance(what, Looking):
            assert there.pattern is not None
            own.append(torch.minimum(there.pattern[:, what.heads[0]], what.pattern[:, 0]).sum(-1)[real])
        else:
            own.append(activations(bench.subject.basis[site], there)[real][:, what.nodes])
            guess.append(what.values[real])
    if not guess:
        return float(torch.cat(own).mean())
    wanted, said = torch.cat(own), torch.cat(guess)
    return 1 - float((wanted - said).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12))
