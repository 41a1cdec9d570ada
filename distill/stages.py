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

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distill import config
from distill.compile import compile_circuit, legal_groups, parity, reload_gate
from distill.rows import batches, tune_rows
from evals.capability import answers, grade
from evals.sandbox import Sandbox
from evals.tasks import Row, Task
from graphs.absorb import absorbed, moments
from graphs.artifact import digest, stage
from graphs.batches import Encoded, Epochs, collate
from graphs.fit import FitConfig, distill, fit, quality, set_means
from graphs.host import Host, load, save
from graphs.prune import PruneConfig, Size, family, kept_nodes, learn_gates, smallest
from graphs.replace import Replacement
from graphs.train import discard

HEAL_RATE = 2.5e-3


@dataclass(frozen=True)
class Job:
    """What every stage needs: the host, the clean rows' batches, and where to write."""

    host: Host
    texts: Sequence[tuple[str, str]]
    data: Epochs
    rows: list[Encoded]
    tasks: Sequence[Task]
    folder: Path
    verb: config.Fit

    @property
    def work(self) -> Path:
        """Where states and intermediate stages live."""
        return self.folder / ".work"


def prepare(model: Path, texts: Sequence[tuple[str, str]], tasks: Sequence[Task], verb: config.Fit) -> Job:
    """Load the model and tokenise the rows."""
    host = load(model)
    data, rows = batches(host, texts, verb.batch, verb.seed)
    return Job(host, texts, data, rows, tasks, verb.out, verb)


def fit_settings(verb: config.Fit) -> FitConfig:
    """The fit's settings from the flags."""
    return FitConfig(features=verb.features, local_steps=verb.fit_steps, joint_steps=verb.joint_steps, sparsity=verb.sparsity,
                     attention=verb.attention, seed=verb.seed)


def graph_stage(job: Job, model: Path) -> dict:
    """graph/: fit every site on clean rows."""
    settings, started = fit_settings(job.verb), time.monotonic()

    def make(out: Path) -> dict:
        replacement, losses = fit(job.host, job.data, settings, state)
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
    return PruneConfig(steps=verb.gate_steps, seed=verb.seed)


def gated_stage(job: Job, graph: dict, verb: config.Prune) -> dict:
    """.work/gated/: learn the gates while the parts adapt; save parts and gate logits."""
    from safetensors.torch import save_file

    settings, started = gate_settings(verb), time.monotonic()

    def make(out: Path) -> dict:
        replacement = Replacement.load(job.folder / "graph", job.host)
        order, losses = learn_gates(job.host, replacement, job.data, settings, state, first=verb.fit_steps + verb.joint_steps)
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
    before: dict[str, float]

    def retention(self, host: Host) -> dict[str, float]:
        """Retention by task."""
        return {name: value / max(self.before[name], 1e-9) for name, value in measure(host, self.tasks, self.rows, self.sandbox).items()}


def measure(host: Host, tasks: Sequence[Task], rows: dict[str, list[Row]], sandbox: Sandbox) -> dict[str, float]:
    """The share of right answers by task."""
    out = {}
    for task in tasks:
        right = grade(rows[task.name], answers(host, task, rows[task.name]), sandbox).right
        out[task.name] = sum(right) / len(right)
    return out


def circuit_stage(job: Job, gated: dict, verb: config.Prune, sandbox: Sandbox) -> dict:
    """circuit/: choose the size on tune, prune, heal."""
    started = time.monotonic()

    def make(out: Path) -> dict:
        from safetensors.torch import load_file

        replacement = Replacement.load(job.work / "gated", job.host)
        order = load_file(job.work / "gated" / "gates.safetensors")
        rows = tune_rows(job.tasks, verb.tune_rows)
        tuner = Tuner(rows, job.tasks, sandbox, measure(job.host, job.tasks, rows, sandbox))
        sizes = family(replacement, legal_groups(job.host.config))
        first, found = verb.fit_steps + verb.joint_steps + verb.gate_steps, moments(replacement, job.data)

        def candidate(size: Size, steps: int) -> Replacement:
            circuit = absorbed(replacement, kept_nodes(order, size), found)
            distill(job.host, circuit, job.data, steps, HEAL_RATE, 0.1, f"try {size.heads} heads, {size.features} features", first=first)
            return circuit

        size, curve = choose(sizes, candidate, tuner, verb)
        chosen_at = time.monotonic()
        circuit = candidate(size, 0)
        losses = distill(job.host, circuit, job.data, verb.heal_steps, HEAL_RATE, 0.1, "heal", state, first=first)
        set_means(circuit, job.data)
        circuit.save(out)
        return {"size": asdict(size), "curve": curve, "losses": losses,
                "tune_before": tuner.before, "tune_retention": tuner.retention(circuit.host()),
                "kept": {name: kept.tolist() for name, kept in kept_nodes(order, size).items()}, "nodes": replacement.node_counts(),
                "seconds_choose": chosen_at - started, "seconds": time.monotonic() - started}

    key = digest(gated["key"], verb.keep, verb.target_params, verb.heal_steps, verb.try_steps, verb.tune_rows)
    state = job.work / f"heal-{key}"
    receipt, cached = stage(job.folder / "circuit", key, make)
    discard(state)
    return receipt | {"cached": cached}


def choose(sizes: Sequence[Size], candidate: Callable[[Size, int], Replacement], tuner: Tuner, verb: config.Prune) -> tuple[Size, list[dict]]:
    """The size that the flags ask for, and every point that was measured on the way.

    Each candidate is healed for `try_steps` batches before it is judged, and must keep the asked share of what the whole
    graph scores on tune after as many: healing is not finished there, so the model's own score is no fair bar yet.
    """
    curve: list[dict] = []

    def point(size: Size) -> dict:
        circuit = candidate(size, verb.try_steps)
        retention = tuner.retention(circuit.host())
        curve.append({**asdict(size), "params": stored(circuit), "retention": retention, "metric": min(retention.values())})
        return curve[-1]

    if verb.target_params is not None:
        affordable = [size for size in sizes if stored(candidate(size, 0)) <= verb.target_params]
        if not affordable:
            raise ValueError(f"--target-params {verb.target_params}: even the smallest circuit is larger; ask for more")
        chosen = affordable[0]
        point(chosen)
    else:
        whole = point(sizes[0])["retention"]

        def passes(size: Size) -> bool:
            kept = point(size)["retention"]
            return all(kept[task] >= verb.keep * whole[task] for task in kept)

        chosen = smallest(sizes, passes)
    for entry in curve:
        entry["chosen"] = entry["features"] == chosen.features
    return chosen, sorted(curve, key=lambda entry: entry["params"])


def stored(circuit: Replacement) -> int:
    """Parameters of the circuit apart from embeddings."""
    embeddings = {id(p) for p in (*circuit.model.get_input_embeddings().parameters(), *circuit.model.get_output_embeddings().parameters())}
    return sum(p.numel() for p in circuit.model.parameters() if id(p) not in embeddings)


def checkpoint_stage(job: Job, circuit: dict, verb: config.Prune) -> dict:
    """checkpoint/: compile, prove parity, write, reload in a fresh process."""
    started = time.monotonic()

    def make(out: Path) -> dict:
        running = Replacement.load(job.folder / "circuit", job.host)
        compiled = compile_circuit(running, verb.target)
        probe = job.rows[:32]
        difference = parity(running, compiled, collate(probe, job.host.tokenizer.eos_token_id))
        if difference > 1e-4:
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
