"""The search for the circuit to keep: pruned, healed and judged on the tune split, size by size.

The rung that the gates were drawn to is healed first. Where it does not keep the asked share on tune, larger ones are healed
until one does. Where it does, it is pruned further, rung by rung, with a third of the healing each, until a rung fails. A rung passes
where two standard errors are to spare (cf. the one-standard-error rule, Breiman et al. 1984, "Classification and regression
trees", section 3.4.3): the smallest of several that just pass on tune fails on test. (Circuits cannot be told apart before healing:
LOG.md.) To go below the first rung that passes, a circuit must besides still answer the asked share of the rows that the model itself
answers rightly: new right answers on tune make up for lost ones there, not on test (LOG.md). A budget names one size, and that one is healed.

`--start RUN` begins with the circuit that another run has healed, and only prunes further. Where that leaves it nearly as close to the model as it
was, on tune, it is left so: healing at the rate that a fresh circuit needs would cost more than it mends (LOG.md). Elsewhere what was healed
once needs a tenth of the tokens to be healed again; `--heal-tokens` decides instead where it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.budget import bought, spent, stored
from distill.compile import legal_groups
from distill.job import Job
from evals.capability import answers, grade
from evals.fidelity import compare
from evals.sandbox import Sandbox
from evals.size import parameters
from evals.tasks import Row, Task
from graphs.absorb import absorbed, moments
from graphs.artifact import read_json
from graphs.fit import distill
from graphs.host import Host
from graphs.losses import PROMPT_WEIGHT
from graphs.processes import main
from graphs.prune import Size, family, inside, kept_nodes, within
from graphs.replace import Replacement

HEAL_RATE = 2.5e-3
MARGIN = 2.0
"""Standard errors that a rung must have to spare on tune."""
RUNGS = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
"""Shares of the fitted width that the search for the smallest circuit steps through."""
NEAR = 1.5
"""A circuit that `--start` prunes further is not healed where its KL to the model on tune is at most so many times what it was."""
AGAIN = 3
"""A circuit that is pruned further is healed with one part in this of the healing."""


@dataclass(frozen=True)
class Healed:
    """A circuit of one size after healing, the nodes it holds, what it keeps on tune, the least of that less its margin, the least share of the
    model's right answers that are right still, the losses of all healing, and how far it was from the model when it had been pruned and
    when it had been healed; where it was cut out of a healed circuit, also how far the first one was."""

    size: Size
    kept: dict[str, Tensor]
    circuit: Replacement
    retention: dict[str, float]
    certain: float
    still: float
    losses: list[float]
    kl: dict[str, float]

    @staticmethod
    def load(folder: Path, host: Host) -> Healed:
        """The circuit of a finished run."""
        made = read_json(folder / "circuit" / "receipt.json")
        kept = {name: torch.tensor(nodes, dtype=torch.long) for name, nodes in made["kept"].items()}
        return Healed(Size(**made["size"]), kept, Replacement.load(folder / "circuit", host), made["tune_retention"], 0.0, 0.0, made["losses"],
                      {key: made["kl"][key] for key in ("pruned", "healed")})


@dataclass(frozen=True)
class Search:
    """job, verb: of the run; whole: the graph with its gates learned; order: what ranks its nodes; followed: rows that KL is taken on;
    state: where a rung's training is saved; tried: every rung that was healed and judged, filled on the way."""

    job: Job
    verb: config.Prune
    whole: Replacement
    order: Mapping[str, Tensor]
    tuner: Tuner
    followed: Sequence[Row]
    state: Path
    tried: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> Healed:
        """The circuit to keep. Raises ValueError where a budget asks for more than the circuit to start from holds."""
        best = self.upward() if self.verb.start is None else Healed.load(self.verb.start, self.job.host)
        for size in self.smaller(best):
            again = self.verb.healing if self.verb.start else self.verb.healing // AGAIN
            further = self.further(best, size, self.steps(again))
            if self.verb.budget is None and not (self.passes(further) and further.still >= self.verb.share):
                break
            best = further
        for entry in self.tried:
            entry["chosen"] = entry["share"] == best.size.share
        return best

    def upward(self) -> Healed:
        """The first rung that passes, from the one that the gates were drawn to; where there is a budget, the size it buys."""
        found = moments(self.whole, self.job.data)
        for size in self.rungs[self.first():]:
            kept = kept_nodes(self.order, size)
            best = self.heal(size, kept, absorbed(self.whole, kept, found, self.components), self.steps(self.verb.healing), [])
            if self.passes(best):
                break
        return best

    def smaller(self, best: Healed) -> list[Size]:
        """The rungs below `best`, largest first: none where it does not pass, or was not the first to be tried."""
        verb = self.verb
        if verb.start is not None and verb.budget is not None:
            stored_whole = parameters(self.job.host.model).stored
            if spent(self.whole, best.size, verb, stored_whole) <= verb.budget[1]:
                raise ValueError(f"--start {verb.start}: its circuit ({best.size}) is within the budget already; ask for less, or leave --start out")
            return [bought(self.whole, verb, stored_whole, best.size)]
        if verb.start is not None:
            return [size for size in self.rungs[::-1] if size.within(best.size) and size != best.size]
        first = self.first()
        return self.rungs[:first][::-1] if verb.budget is None and self.passes(best) and best.size == self.rungs[first] else []

    def further(self, best: Healed, size: Size, steps: int) -> Healed:
        """`best` pruned to `size` and healed again."""
        then = kept_nodes(within(self.order, best.kept), size)
        circuit = absorbed(best.circuit, inside(best.kept, then, size.per), moments(best.circuit, self.job.data), self.components)
        near = NEAR * best.kl["healed"] if self.verb.start and self.verb.heal_tokens is None else 0.0
        healed = self.heal(size, then, circuit, steps, best.losses, near)
        return replace(healed, kl={f"first_{what}": best.kl.get(f"first_{what}", best.kl[what]) for what in ("pruned", "healed")} | healed.kl)

    def heal(self, size: Size, kept: dict[str, Tensor], circuit: Replacement, steps: int, before: list[float], near: float = 0.0) -> Healed:
        """Heal a circuit that was just cut out, unless it is as near to the model as that, and judge it. before: losses of the healing that led
        to it; near: nats a completion token."""
        host, label = self.job.host, f"heal {size}"
        pruned = divergence_from(host, circuit, self.followed)
        state = self.state.with_suffix(f".{size.key}")
        losses = [] if pruned <= near else distill(self.job.targets, circuit, steps, HEAL_RATE, PROMPT_WEIGHT, label, state, self.trained,
                                                   self.verb.heal_decay, answers=self.verb.answers)
        found, still = self.tuner.retention(circuit.host())
        certain = min(share - MARGIN * error for share, error in found.values())
        kl = {"pruned": pruned, "healed": divergence_from(host, circuit, self.followed) if losses else pruned}
        healed = Healed(size, kept, circuit, {name: share for name, (share, _) in found.items()}, certain, still, before + losses, kl)
        said = ", ".join(f"{name} {share:.3f} +- {error:.3f}" for name, (share, error) in found.items())
        if main():
            print(f"{label}: keeps {said} of the model's own on tune, {still:.3f} of its right answers; asked {self.verb.share:.3f}", file=sys.stderr)
        self.tried.append({**asdict(size), "params": stored(circuit, self.verb.target).stored, "retention": healed.retention})
        return healed

    def passes(self, healed: Healed) -> bool:
        """Whether a circuit keeps the asked share on tune."""
        return healed.certain >= self.verb.share

    @cached_property
    def rungs(self) -> list[Size]:
        """The sizes to try, smallest first."""
        model = self.job.host.model
        if self.verb.budget is not None:
            return [bought(self.whole, self.verb, parameters(model).stored)]
        sizes = family(self.whole, legal_groups(model, self.verb.target, self.verb.basis != "features"), self.components)
        found = {next((size for size in sizes if size.share <= rung + 1e-9), sizes[-1]) for rung in RUNGS}
        return sorted(found, key=lambda size: size.share)

    def first(self) -> int:
        """Which rung is tried first: the largest within what the gates were drawn to."""
        return max((place for place, size in enumerate(self.rungs) if size.share <= self.job.drawn), default=0)

    def steps(self, tokens: int) -> int:
        """Batches that hold `tokens` tokens."""
        return self.job.data.steps(tokens, self.trained)

    @property
    def trained(self) -> int:
        """Batches seen before any healing."""
        return self.verb.fitting + self.verb.gate_steps

    @property
    def components(self) -> bool:
        """Whether attention's nodes are components."""
        return self.verb.attention_nodes == "components"


@dataclass(frozen=True)
class Tuner:
    """The task metric on the tune split, as a share of the model's own: what the threshold looks at."""

    rows: dict[str, list[Row]]
    tasks: Sequence[Task]
    sandbox: Sandbox
    before: dict[str, list[bool]]

    def retention(self, host: Host) -> tuple[dict[str, tuple[float, float]], float]:
        """Retention by task with its standard error (the delta method for a ratio of paired means), and the least share of the model's
        own right answers that are right still."""
        after = measure(host, self.tasks, self.rows, self.sandbox)
        both = {name: [now and then for now, then in zip(right, self.before[name], strict=True)] for name, right in after.items()}
        return {name: ratio(right, self.before[name]) for name, right in after.items()}, min(ratio(both[name], self.before[name])[0] for name in both)


def ratio(after: Sequence[bool], before: Sequence[bool]) -> tuple[float, float]:
    """mean(after) / mean(before) over the same rows, and its standard error."""
    a, b = torch.tensor(after, dtype=torch.float64), torch.tensor(before, dtype=torch.float64)
    base = max(float(b.mean()), 1e-9)
    share = float(a.mean()) / base
    return share, float((a - share * b).square().mean().sqrt()) / len(a) ** 0.5 / base


def measure(host: Host, tasks: Sequence[Task], rows: dict[str, list[Row]], sandbox: Sandbox) -> dict[str, list[bool]]:
    """Whether each row's answer is right, by task."""
    return {task.name: grade(rows[task.name], answers(host, task, rows[task.name]), sandbox).right for task in tasks}


def divergence_from(host: Host, circuit: Replacement, rows: Sequence[Row]) -> float:
    """Mean KL from the model to a running circuit on rows that nothing was trained on, nats a completion token."""
    kl = compare(circuit.host(), host, rows).kl
    return sum(kl) / len(kl)
