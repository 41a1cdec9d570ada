"""`distill test RUN --on CHECKPOINT`: what was understood of a run, as regression tests of a checkpoint of its shape.

In the checkpoint that a circuit was compiled into, the neurons of its MLPs are the circuit's features and the value dimensions of its
heads the circuit's components, in another basis inside each head. So every accepted hypothesis and equation is tested in the checkpoint
itself, by substitution, on held-out rows and on the same rows shifted (each behind another whole row), beside the run's own circuit
on the same rows. One fails where it recovers less of its target's effect than in the circuit by more than `--drop`, or where there is
no effect left.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from distill.config_hypotheses import Test
from distill.report import visible
from distill.rows import DEFENDER_SEED
from distill.runs import Opened, reopen, settings_of
from distill.surroundings import behind
from distill.understand import BATCH, kept
from evals.tasks import named
from graphs.architectures import attention_components, neurons
from graphs.batches import Batch, Epochs, encode
from graphs.components import Components
from graphs.dictionary import Dictionary
from graphs.edges import Reconstruction
from graphs.graph import index
from graphs.host import Host, load
from graphs.hypotheses.hypothesis import Hypothesis
from graphs.hypotheses.substitution import means
from graphs.hypotheses.verdict import FLOOR, Bench, judge
from graphs.replace import Replacement

MEANS = 64
"""Clean rows that means are taken on."""


@dataclass(frozen=True)
class Line:
    """One hypothesis on one kind of rows: what it recovers, and the ablated effect in nats a token, in the circuit and in the checkpoint."""

    target: str
    said: str
    rows: str
    before: float
    after: float
    effect_before: float
    effect_after: float
    failed: bool


def run(verb: Test) -> int:
    """Test and print; 1 where any fails."""
    lines = measure(verb)
    failed = sum(line.failed for line in lines)
    print(json.dumps([vars(line) for line in lines], indent=1) if verb.json else page(verb, lines))
    return 1 if failed else 0


def measure(verb: Test) -> list[Line]:
    """Every accepted hypothesis on held-out and shifted rows. Raises ValueError where the checkpoint has not the circuit's shape."""
    opened = reopen(verb.run, "circuit")
    accepted = [one.hypothesis for one in kept(opened) if one.evidence.accepted]
    if not accepted:
        raise ValueError(f"--run {verb.run}: none of its hypotheses was accepted, so there is nothing to test; give a run with some")
    host = load(verb.on)
    other = Reconstruction(host, in_basis_of(opened, verb, host))
    lines = []
    for name, batches in rows(verb, opened).items():
        benches = [Bench.of(subject, index(subject.host, subject.basis), means(subject, opened.sample(MEANS)), batches, verb.seed)
                   for subject in (opened.subject, other)]
        lines += [compare(one, name, benches[0], benches[1], verb.drop) for one in accepted]
    return lines


def compare(one: Hypothesis, rows: str, before: Bench, after: Bench, drop: float) -> Line:
    """One hypothesis in both."""
    was, now = (judge(bench, one, control=False).evidence for bench in (before, after))
    lost = now.recovered.value < was.recovered.value - drop or now.ablated < FLOOR <= was.ablated
    return Line(one.target, one.rule.said(), rows, was.recovered.value, now.recovered.value, was.ablated, now.ablated, lost)


def rows(verb: Test, opened: Opened) -> dict[str, list[Batch]]:
    """Held-out rows, and each again behind another whole row."""
    host = opened.model
    texts = [row for task in named(settings_of(verb.run).task) for row in task.rows("test", verb.prompts, seed=DEFENDER_SEED)]
    plain = encode(host.tokenizer, [(row.prompt, row.completion) for row in texts], host.config.max_position_embeddings)
    pairs = (behind(second, [first], host.config.max_position_embeddings) for first, second in zip(plain[1:], plain, strict=False))
    shifted = [one for one in pairs if one is not None]
    return {name: list(Epochs(found, BATCH, host.tokenizer.eos_token_id, 0).once())
            for name, found in (("held out", plain), ("shifted", shifted)) if found}


def in_basis_of(opened: Opened, verb: Test, host: Host) -> dict[str, Dictionary | Components]:
    """The checkpoint's own neurons and heads under the names that the circuit's nodes have."""
    stored = Replacement.load(verb.run / "circuit", opened.model)  # as it was compiled, before its components were given names
    found: dict[str, Dictionary | Components] = {}
    remedy = f"give {verb.run}/checkpoint or what became of it"
    for site in opened.subject.host.sites:
        wanted = opened.subject.basis[site.name]
        same = next((one for one in host.sites if one.name == site.name), None)
        if same is None or (same.d_in, same.d_out) != (site.d_in, site.d_out) or host.config.vocab_size != opened.model.config.vocab_size:
            raise ValueError(f"--on {verb.on}: it has not the shape of the run's circuit at {site.name}; {remedy}")
        if isinstance(wanted, Components):
            own, before = attention_components(host.model, same), attention_components(stored.model, site, stored.part(site))
            if own.read.shape != before.read.shape or own.write.shape != before.write.shape:
                raise ValueError(f"--on {verb.on}: its {site.name} has not the heads of the run's circuit; {remedy}")
            found[site.name] = renamed(own, before, wanted)
        else:
            found[site.name] = neurons(host.model, same)
            if found[site.name].count < wanted.count:
                raise ValueError(f"--on {verb.on}: its {site.name} has {found[site.name].count} neurons, the circuit {wanted.count}; {remedy}")
    return found


def renamed(own: Components, before: Components, after: Components) -> Components:
    """`own` in the basis that takes `before` to `after` (the same layer in two bases). Directions that were dropped stay dropped."""
    reads, biases, writes = [], [], []
    for group in range(len(own.read)):
        turn = torch.linalg.lstsq(before.read[group].double().T, after.read[group].double().T, driver="gelsd").solution.T  # "new old"
        back = torch.linalg.pinv(turn).T
        reads.append(turn @ own.read[group].double())
        biases.append(turn @ own.bias[group].double())
        writes += [back @ one.double() for one in own.write[group * own.per_group : (group + 1) * own.per_group]]
    return Components(torch.stack(reads).to(own.read), torch.stack(biases).to(own.read), torch.stack(writes).to(own.read), own.constant)


def page(verb: Test, lines: list[Line]) -> str:
    """What a person reads: what failed, first what lost most."""
    failed = sorted((line for line in lines if line.failed), key=lambda line: line.after - line.before)
    said: list[str] = []
    for line in failed:
        said += [f"FAIL {line.target} ({line.rows}): {visible(line.said)}",
                 f"  - recovers {line.before:.2f} of {line.effect_before:.1e} nats in the circuit",
                 f"  + recovers {line.after:.2f} of {line.effect_after:.1e} nats in {verb.on}"]
    count: dict[str, Any] = {name: [line.failed for line in lines if line.rows == name] for name in dict.fromkeys(line.rows for line in lines)}
    return "\n".join([*said, *(f"{name}: {len(found) - sum(found)} of {len(found)} hypotheses hold" for name, found in count.items())])
