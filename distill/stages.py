"""The stages of a run: each is a folder named by the hash of its inputs, made whole or not at all, found again when the
inputs are the same.

    graph/       the fitted replacement model: every MLP and attention layer from noise         key: model, rows, fit settings, dictionaries
    gated/       gates learned, parts adapted, nodes ranked (kept under .work)                  key: graph, gate settings
    tune/        what the model and the whole graph do on the tune split (under .work)          key: gated, tasks, tune rows
    circuit/     the smallest kept set that passes on tune, healed                              key: gated, keep, heal settings
    checkpoint/  the circuit as a stock dense model, parity and reload proven                   key: circuit, target

Long training inside a stage saves its own state, so a killed run loses seconds; of several processes the main one writes. No stage
is given the organism's `secret/`, by signature: the checkpoint cannot depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill import config
from distill.compile import compile_circuit, home, parity, reload_gate
from distill.job import Job, fit_settings, gate_settings
from distill.models import downloaded
from distill.rows import tune_rows
from distill.search import AGAIN, HEAL_RATE, MARGIN, NEAR, RUNGS, Search, Tuner, divergence_from, measure
from evals.sandbox import Sandbox
from evals.tasks import Row
from graphs.artifact import digest, read_json, stage
from graphs.batches import collate
from graphs.canonical import canonical
from graphs.fit import fit, quality, set_means
from graphs.host import save
from graphs.losses import SOFT
from graphs.mend import mend
from graphs.processes import agreed
from graphs.prune import learn_gates
from graphs.published import transcoders
from graphs.replace import Replacement
from graphs.train import discard

FOLLOWED = 128
"""Rows of each task's tune split that KL is taken on."""


def road(job: Job, model: Path, verb: config.Prune, times: list[dict]) -> dict[str, Any]:
    """All stages up to the checkpoint; returns their receipts, and the rows, steps and tokens that they trained on."""
    made: dict[str, Any] = {"graph": timed("fit", lambda: graph_stage(job, model), times)}
    with Sandbox() as sandbox:
        made["gated"] = timed("gates", lambda: gated_stage(job, made["graph"], verb), times)
        made["circuit"] = timed("heal", lambda: circuit_stage(job, made["gated"], verb, sandbox), times)
    made["checkpoint"] = timed("compile", lambda: checkpoint_stage(job, made["circuit"], verb), times)
    losses = [*made["graph"]["losses"].values(), made["gated"]["losses"], made["circuit"]["losses"]]
    steps = sum(map(len, losses))
    return made | {"rows": len(job.rows), "steps": steps, "tokens": job.data.tokens(steps)}


def graph_stage(job: Job, model: Path) -> dict:
    """graph/: fit every site on clean rows."""
    settings, mended, started = fit_settings(job.verb), job.verb.mend_steps, time.monotonic()
    published = downloaded(job.verb.dictionaries) if job.verb.dictionaries else None

    def make(out: Path) -> dict:
        given = None if published is None else transcoders(published, job.host, job.data, settings.features, settings.skip, job.verb.hook,
                                                           fitted=bool(settings.local_steps))
        replacement, losses = fit(job.targets, settings, state, given)
        if mended:
            first = settings.local_steps + settings.joint_steps
            losses |= mend(job.targets, replacement, mended, settings, first, state.with_suffix(".mend"))
        agreed(lambda: replacement.save(out))
        return {"settings": asdict(settings), "losses": losses, "quality": quality(job.host, replacement, job.data),
                "seconds": time.monotonic() - started}

    key = digest(model, job.texts, settings, job.verb.batch, *[mended] * bool(mended), *([] if job.tokens is None else [job.tokens]),
                 *([] if published is None else [published, job.verb.hook]))
    state = job.work / f"fit-{key}"
    receipt, cached = stage(job.folder / "graph", key, make)
    discard(state)
    return receipt | {"cached": cached}


def gated_stage(job: Job, graph: dict, verb: config.Prune) -> dict:
    """.work/gated/: learn the gates while the parts adapt; save parts and gate logits."""
    from safetensors.torch import save_file

    settings, started = gate_settings(job, verb), time.monotonic()

    def make(out: Path) -> dict:
        replacement = Replacement.load(job.folder / "graph", job.host)
        if job.tokens is not None:
            replacement.keep_tokens(job.tokens)
        if settings.components:
            canonical(replacement, job.data)
        order, losses = learn_gates(job.targets, replacement, settings, state, first=verb.fitting)
        set_means(replacement, job.data)
        agreed(lambda: replacement.save(out))
        agreed(lambda: save_file(order, out / "gates.safetensors"))
        return {"settings": asdict(settings), "losses": losses, "tokens": replacement.tokens and len(replacement.tokens),
                "seconds": time.monotonic() - started}

    key = digest(graph["key"], settings)
    state = job.work / f"gates-{key}"
    receipt, cached = stage(job.work / "gated", key, make)
    discard(state)
    return receipt | {"cached": cached}


def tune_stage(job: Job, gated: dict, graph: Replacement, verb: config.Prune, rows: dict[str, list[Row]], sandbox: Sandbox) -> dict:
    """.work/tune/: which tune rows the model itself gets right, by task, and how far the whole graph is from it."""
    def make(_out: Path) -> dict:
        return {"right": measure(job.host, job.tasks, rows, sandbox), "kl": divergence_from(job.host, graph, followed(rows))}

    return stage(job.work / "tune", digest(gated["key"], [task.key for task in job.tasks], verb.tune_rows, FOLLOWED), make)[0]


def followed(rows: dict[str, list[Row]]) -> list[Row]:
    """The tune rows that KL is taken on."""
    return [row for found in rows.values() for row in found[:FOLLOWED]]


def circuit_stage(job: Job, gated: dict, verb: config.Prune, sandbox: Sandbox) -> dict:
    """circuit/: the smallest rung that keeps the asked share on tune, pruned and healed."""
    started = time.monotonic()

    def make(out: Path) -> dict:
        from safetensors.torch import load_file

        replacement = Replacement.load(job.work / "gated", job.host)
        order = load_file(job.work / "gated" / "gates.safetensors")
        rows = tune_rows(job.tasks, verb.tune_rows)
        seen = tune_stage(job, gated, replacement, verb, rows, sandbox)
        search = Search(job, verb, replacement, order, Tuner(rows, job.tasks, sandbox, seen["right"]), followed(rows), state)
        chosen = search.run()
        set_means(chosen.circuit, job.data)
        agreed(lambda: chosen.circuit.save(out))
        tuned = {name: sum(right) / len(right) for name, right in seen["right"].items()}
        return {"size": asdict(chosen.size), "curve": sorted(search.tried, key=lambda entry: entry["params"]), "losses": chosen.losses,
                "tune_before": tuned, "tune_retention": chosen.retention,
                "kl": {"graph": seen["kl"]} | chosen.kl,
                "kept": {name: kept.tolist() for name, kept in chosen.kept.items()}, "nodes": replacement.node_counts(),
                "seconds": time.monotonic() - started}

    becomes = home(job.host.model, verb.target, verb.basis != "features")
    tasks = [task.key for task in job.tasks]
    settings = (tasks, FOLLOWED, HEAL_RATE, verb.share, verb.budget, becomes, verb.healing, verb.heal_decay, (verb.answers, SOFT),
                verb.tune_rows, RUNGS, MARGIN, AGAIN)
    key = digest(gated["key"], settings, verb.start and (NEAR, read_json(verb.start / "circuit" / "receipt.json")["key"]))
    state = job.work / f"heal-{key}"
    receipt, cached = stage(job.folder / "circuit", key, make)
    discard(state)
    return receipt | {"cached": cached}


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

    receipt, cached = agreed(lambda: stage(job.folder / "checkpoint", digest(circuit["key"], verb.target), make))
    return receipt | {"cached": cached, "seconds": time.monotonic() - started}


def timed(name: str, work: Callable[[], dict], times: list[dict]) -> dict:
    """Run a stage and note how long it took this time."""
    started = time.monotonic()
    receipt = work()
    times.append({"name": name, "seconds": time.monotonic() - started, "cached": bool(receipt.get("cached"))})
    return receipt
