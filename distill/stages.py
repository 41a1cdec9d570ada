"""The stages of a run: each is a folder named by the hash of its inputs, made whole or not at all, found again when the
inputs are the same.

    graph/       the fitted replacement model: every MLP and attention layer from noise         key: model, rows, fit settings
    gated/       gates learned, parts adapted, nodes ranked (kept under .work)                  key: graph, gate settings
    circuit/     the smallest kept set that passes on tune, healed                              key: gated, keep, heal settings
    checkpoint/  the circuit as a stock dense model, parity and reload proven                   key: circuit, target

Long training inside a stage saves its own state, so a killed run loses seconds. No stage is given the organism's
`secret/`, by signature: the checkpoint cannot depend on it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill import config
from distill.budget import affordable, check, stored
from distill.compile import compile_circuit, home, legal_groups, parity, reload_gate
from distill.rows import batches, tune_rows
from evals.capability import answers, grade
from evals.fidelity import compare
from evals.sandbox import Sandbox
from evals.size import parameters
from evals.tasks import Row, Task
from graphs.absorb import absorbed, moments
from graphs.artifact import digest, stage
from graphs.batches import Encoded, Epochs, collate
from graphs.canonical import canonical
from graphs.fit import FitConfig, distill, fit, quality, set_means
from graphs.host import Host, load, save
from graphs.prune import PruneConfig, Size, family, inside, kept_nodes, learn_gates, within
from graphs.replace import Replacement, from_noise
from graphs.targets import Targets
from graphs.train import discard

HEAL_RATE = 2.5e-3
FOLLOWED = 128
"""Rows of each task's tune split that KL is taken on."""
MARGIN = 2.0
"""Standard errors that a rung must have to spare on tune."""
RUNGS = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
"""Shares of the fitted width that the search for the smallest circuit steps through."""


@dataclass(frozen=True)
class Job:
    """What every stage needs: the host, the clean rows' batches, and where to write."""

    host: Host
    texts: Sequence[tuple[str, str]]
    data: Epochs
    targets: Targets
    rows: list[Encoded]
    tasks: Sequence[Task]
    folder: Path
    verb: config.Fit

    @property
    def work(self) -> Path:
        """Where states and intermediate stages live."""
        return self.folder / ".work"


def prepare(model: Path, texts: Sequence[tuple[str, str]], tasks: Sequence[Task], verb: config.Fit) -> Job:
    """Load the model and tokenise the rows. Raises ValueError where no class could hold the circuit, or none is as small as asked."""
    host = load(model)
    home(host.model, verb.target if isinstance(verb, config.Prune) else "auto", verb.basis != "features", verb.attention == "kept")
    if isinstance(verb, config.Prune) and verb.budget is not None:
        settings = fit_settings(verb)
        start = from_noise(host, settings.features, settings.seed, settings.attention, settings.skip, settings.basis)
        check(start, verb, parameters(host.model).stored)
    data, rows = batches(host, texts, verb.batch, verb.seed)
    return Job(host, texts, data, Targets(host, data), rows, tasks, verb.out, verb)


def road(job: Job, model: Path, verb: config.Prune, times: list[dict]) -> dict[str, Any]:
    """All stages up to the checkpoint; returns their receipts, and the rows, steps and tokens that they trained on."""
    made: dict[str, Any] = {"graph": timed("fit", lambda: graph_stage(job, model), times)}
    with Sandbox() as sandbox:
        made["gated"] = timed("gates", lambda: gated_stage(job, made["graph"], verb), times)
        made["circuit"] = timed("heal", lambda: circuit_stage(job, made["gated"], verb, sandbox), times)
    made["checkpoint"] = timed("compile", lambda: checkpoint_stage(job, made["circuit"], verb), times)
    losses = [*made["graph"]["losses"].values(), made["gated"]["losses"], made["circuit"]["losses"]]
    steps = sum(map(len, losses))
    return made | {"rows": len(job.rows), "steps": steps, "tokens": sum(int(job.data(step).real.sum()) for step in range(steps))}


def fit_settings(verb: config.Fit) -> FitConfig:
    """The fit's settings from the flags."""
    if verb.basis != "features":  # features and their sparsity are of transcoders
        return FitConfig(features=0, local_steps=verb.fit_steps, joint_steps=verb.joint_steps, sparsity=0.0, attention=verb.attention,
                         basis=verb.basis, seed=verb.seed)
    return FitConfig(features=verb.features, local_steps=verb.fit_steps, joint_steps=verb.joint_steps, sparsity=verb.sparsity,
                     attention=verb.attention, skip=verb.skip, basis=verb.basis, seed=verb.seed)


def graph_stage(job: Job, model: Path) -> dict:
    """graph/: fit every site on clean rows."""
    settings, started = fit_settings(job.verb), time.monotonic()

    def make(out: Path) -> dict:
        replacement, losses = fit(job.targets, settings, state)
        replacement.save(out)
        return {"settings": asdict(settings), "losses": losses, "quality": quality(job.host, replacement, job.data),
                "seconds": time.monotonic() - started}

    key = digest(model, job.texts, settings, job.verb.batch)
    state = job.work / f"fit-{key}"
    receipt, cached = stage(job.folder / "graph", key, make)
    discard(state)
    return receipt | {"cached": cached}


def gate_settings(verb: config.Prune) -> PruneConfig:
    """The gates' settings from the flags."""
    return PruneConfig(score=verb.score, steps=verb.gate_steps, seed=verb.seed, components=verb.attention_nodes == "components")


def gated_stage(job: Job, graph: dict, verb: config.Prune) -> dict:
    """.work/gated/: learn the gates while the parts adapt; save parts and gate logits."""
    from safetensors.torch import save_file

    settings, started = gate_settings(verb), time.monotonic()

    def make(out: Path) -> dict:
        replacement = Replacement.load(job.folder / "graph", job.host)
        if settings.components:
            canonical(replacement, job.data)
        order, losses = learn_gates(job.targets, replacement, settings, state, first=verb.fit_steps + verb.joint_steps)
        set_means(replacement, job.data)
        replacement.save(out)
        save_file(order, out / "gates.safetensors")
        return {"settings": asdict(settings), "losses": losses, "seconds": time.monotonic() - started}

    key = digest(graph["key"], settings)
    state = job.work / f"gates-{key}"
    receipt, cached = stage(job.work / "gated", key, make)
    discard(state)
    return receipt | {"cached": cached}


@dataclass(frozen=True)
class Tuner:
    """The task metric on the tune split, as a share of the model's own: what the threshold looks at."""

    rows: dict[str, list[Row]]
    tasks: Sequence[Task]
    sandbox: Sandbox
    before: dict[str, list[bool]]

    def retention(self, host: Host) -> dict[str, tuple[float, float]]:
        """Retention by task, with its standard error (the delta method for a ratio of paired means)."""
        after = measure(host, self.tasks, self.rows, self.sandbox)
        return {name: ratio(after[name], self.before[name]) for name in after}


def ratio(after: Sequence[bool], before: Sequence[bool]) -> tuple[float, float]:
    """mean(after) / mean(before) over the same rows, and its standard error."""
    a, b = torch.tensor(after, dtype=torch.float64), torch.tensor(before, dtype=torch.float64)
    base = max(float(b.mean()), 1e-9)
    share = float(a.mean()) / base
    return share, float((a - share * b).square().mean().sqrt()) / len(a) ** 0.5 / base


def measure(host: Host, tasks: Sequence[Task], rows: dict[str, list[Row]], sandbox: Sandbox) -> dict[str, list[bool]]:
    """Whether each row's answer is right, by task."""
    return {task.name: grade(rows[task.name], answers(host, task, rows[task.name]), sandbox).right for task in tasks}


def circuit_stage(job: Job, gated: dict, verb: config.Prune, sandbox: Sandbox) -> dict:
    """circuit/: the smallest rung that keeps the asked share on tune, pruned and healed."""
    started = time.monotonic()

    def make(out: Path) -> dict:
        from safetensors.torch import load_file

        replacement = Replacement.load(job.work / "gated", job.host)
        order = load_file(job.work / "gated" / "gates.safetensors")
        rows = tune_rows(job.tasks, verb.tune_rows)
        tuner = Tuner(rows, job.tasks, sandbox, measure(job.host, job.tasks, rows, sandbox))
        followed = [row for found in rows.values() for row in found[:FOLLOWED]]
        chosen, curve = search(job, replacement, order, tuner, followed, verb, state)
        set_means(chosen.circuit, job.data)
        chosen.circuit.save(out)
        tuned = {name: sum(right) / len(right) for name, right in tuner.before.items()}
        return {"size": asdict(chosen.size), "curve": curve, "losses": chosen.losses, "tune_before": tuned, "tune_retention": chosen.retention,
                "kl": {"graph": divergence_from(job.host, replacement, followed)} | chosen.kl,
                "kept": {name: kept.tolist() for name, kept in chosen.kept.items()}, "nodes": replacement.node_counts(),
                "seconds": time.monotonic() - started}

    becomes = home(job.host.model, verb.target, verb.basis != "features")
    tasks = [task.name for task in job.tasks]
    settings = (tasks, FOLLOWED, HEAL_RATE, verb.share, verb.budget, becomes, verb.healing, verb.heal_decay, verb.tune_rows, RUNGS, MARGIN)
    key = digest(gated["key"], settings)
    state = job.work / f"heal-{key}"
    receipt, cached = stage(job.folder / "circuit", key, make)
    discard(state)
    return receipt | {"cached": cached}


@dataclass(frozen=True)
class Healed:
    """A circuit of one size after healing, the nodes it holds, what it keeps on tune, the least of that less its margin, the
    losses of all healing, and how far it was from the model when it had been pruned and when it had been healed."""

    size: Size
    kept: dict[str, torch.Tensor]
    circuit: Replacement
    retention: dict[str, float]
    certain: float
    losses: list[float]
    kl: dict[str, float]


def divergence_from(host: Host, circuit: Replacement, rows: Sequence[Row]) -> float:
    """Mean KL from the model to a running circuit on rows that nothing was trained on, nats a completion token."""
    kl = compare(circuit.host(), host, rows).kl
    return sum(kl) / len(kl)


def search(
    job: Job, replacement: Replacement, order: dict, tuner: Tuner, followed: Sequence[Row], verb: config.Prune, state: Path
) -> tuple[Healed, list[dict]]:
    """The smallest rung that passes, and every rung that was healed and judged on the way.

    The rung that the gates were drawn to is healed first. Where it does not keep the asked share on tune, larger ones are
    healed until one does. Where it does, it is pruned further, rung by rung, with a third of the healing each, until a
    rung fails. A rung passes where two standard errors are to spare (cf. the one-standard-error rule, Breiman et al. 1984,
    "Classification and regression trees", section 3.4.3): the smallest of several that just pass on tune fails on
    test. (Circuits cannot be told apart before healing: LOG.md.)
    """
    first = verb.fit_steps + verb.joint_steps + verb.gate_steps
    components = verb.attention_nodes == "components"
    curve: list[dict] = []

    def heal(size: Size, kept: dict, circuit: Replacement, steps: int, before: list[float]) -> Healed:
        label = f"heal {size}"
        pruned = divergence_from(job.host, circuit, followed)
        losses = distill(job.targets, circuit, steps, HEAL_RATE, 0.1, label, state.with_suffix(f".{size.key}"), first, verb.heal_decay)
        found = tuner.retention(circuit.host())
        certain = min(share - MARGIN * error for share, error in found.values())
        healed = Healed(size, kept, circuit, {name: share for name, (share, _) in found.items()}, certain, before + losses,
                        {"pruned": pruned, "healed": divergence_from(job.host, circuit, followed)})
        said = ", ".join(f"{name} {share:.3f} +- {error:.3f}" for name, (share, error) in found.items())
        print(f"{label}: keeps {said} of the model's own on tune; asked {verb.share:.3f}", file=sys.stderr)
        curve.append({**asdict(size), "params": stored(circuit, verb.target).stored, "retention": healed.retention})
        return healed

    def passes(healed: Healed) -> bool:
        return healed.certain >= verb.share

    sizes = family(replacement, legal_groups(job.host.model, verb.target, verb.basis != "features"), components)
    if verb.budget is None:
        rungs, start = ladder(sizes, gate_settings(verb).target)
    else:
        rungs, start = [affordable(replacement, order, sizes, verb, parameters(job.host.model).stored)], 0
    found = moments(replacement, job.data)
    for place in range(start, len(rungs)):
        kept = kept_nodes(order, rungs[place])
        best = heal(rungs[place], kept, absorbed(replacement, kept, found, components), verb.healing, [])
        if passes(best):
            break
    if passes(best) and place == start and verb.budget is None:
        for size in reversed(rungs[:start]):
            then = kept_nodes(within(order, best.kept), size)
            left = inside(best.kept, then, size.per)
            smaller = heal(size, then, absorbed(best.circuit, left, moments(best.circuit, job.data), components), verb.healing // 3, best.losses)
            if not passes(smaller):
                break
            best = smaller
    for entry in curve:
        entry["chosen"] = entry["share"] == best.size.share
    return best, sorted(curve, key=lambda entry: entry["params"])


def ladder(sizes: Sequence[Size], target: float) -> tuple[list[Size], int]:
    """The rungs, smallest first, and where to start: the largest rung within `target`."""
    rungs = sorted({next((size for size in sizes if size.share <= rung + 1e-9), sizes[-1]) for rung in RUNGS}, key=lambda size: size.share)
    return rungs, max((place for place, size in enumerate(rungs) if size.share <= target), default=0)


def checkpoint_stage(job: Job, circuit: dict, verb: config.Prune) -> dict:
    """checkpoint/: compile, prove parity, write, reload in a fresh process."""
    started = time.monotonic()

    def make(out: Path) -> dict:
        running = Replacement.load(job.folder / "circuit", job.host)
        compiled = compile_circuit(running, verb.target)
        probe = job.rows[:32]
        difference = parity(running, compiled, collate(probe, job.host.tokenizer.eos_token_id))
        if not difference <= 1e-4:
            raise ValueError(f"parity: the compiled model differs from the circuit by {difference:.2g} > 1e-4; this is a defect, please report it")
        save(compiled, out, torch.float32)
        answer = reload_gate(out, compiled, job.texts[0][0], list(probe[0].ids), job.work)
        return {"target": verb.target, "parity": difference, "reload": answer}

    receipt, cached = stage(job.folder / "checkpoint", digest(circuit["key"], verb.target), make)
    return receipt | {"cached": cached, "seconds": time.monotonic() - started}


def timed(name: str, work: Callable[[], dict], times: list[dict]) -> dict:
    """Run a stage and note how long it took this time."""
    started = time.monotonic()
    receipt = work()
    times.append({"name": name, "seconds": time.monotonic() - started, "cached": bool(receipt.get("cached"))})
    return receipt
