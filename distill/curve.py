"""`distill curve`: which score finds the nodes that carry a task, from none of a run's nodes to all.

Every score ranks the nodes of the same graph: the parts as they were when the run's gates had been learned (the fitted graph, where
those are gone). Rows are of the tune split.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.compile import compile_circuit
from distill.edges import edge_model
from distill.rows import tune_rows
from distill.runs import begun, reopen, settings_of
from distill.search import measure as measure_answers
from evals.sandbox import Sandbox
from evals.size import parameters, speed
from evals.statistics import mean, proportion
from evals.tasks import named
from graphs.batches import Batch, Epochs, encode
from graphs.curve import opened, trace_curve, trace_edge_curve
from graphs.edge_prune import SCORES as EDGE_SCORES
from graphs.edge_prune import set_means
from graphs.host import Host
from graphs.replace import Replacement
from graphs.scores import SCORES

LEARNED = "gates"
BATCH = 32
SHOWN = (0.01, 0.05, 0.1, 0.2, 0.5)
COMPILED = (0.1, 0.2, 0.5, 1.0)
"""Shares that are compiled, with --answers."""


def run(verb: config.Curve) -> int:
    """Measure and print."""
    known, plain = (tuple(EDGE_SCORES), config.Curve().score) if verb.edges else ((LEARNED, *SCORES), "")
    names = known if verb.score == plain else tuple(name.strip() for name in verb.score.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--score {unknown[0]}: no such score{' of edges' * verb.edges}; choose from {', '.join(known)}")
    if verb.edges and verb.answers:
        raise ValueError("--answers compiles what is kept, and a checkpoint has no place for cut edges: leave it out (distill evaluate --as edges)")
    found = edge_curves(verb, names) if verb.edges else measure(verb, names)
    print(json.dumps(found, indent=1) if verb.json else page(found))
    return 0


def measure(verb: config.Curve, names: tuple[str, ...]) -> dict[str, Any]:
    """The curve of each score, as plain data."""
    from safetensors.torch import load_file

    settings, host, data = begun(verb.run)
    gated = verb.run / ".work" / "gated"
    learned = (gated / "gates.safetensors").is_file()
    if LEARNED in names and not learned:
        raise ValueError(f"--score {LEARNED}: {gated} is gone; start the run's command again, or name other scores")
    components = settings.attention_nodes == "components" and learned
    replacement = Replacement.load(gated if learned else verb.run / "graph", host)
    batches, targets = followed(host, settings, verb.judged)
    orders = {name: load_file(gated / "gates.safetensors") if name == LEARNED else SCORES[name](
        replacement, data, verb.score_batches, components, verb.seed) for name in names}
    curves = {name: trace_curve(replacement, order, batches, targets) for name, order in orders.items()}
    return {"run": str(verb.run), "task": settings.task, "basis": settings.basis,
            "attention_nodes": "components" if components else "heads", "parts": "as gated" if learned else "as fitted",
            "rows": sum(len(batch.ids) for batch in batches), "nodes": sum(replacement.node_counts(components).values()),
            "curves": {name: asdict(curve) for name, curve in curves.items()},
            "compiled": compiled(replacement, orders[names[0]], components, verb, settings) if verb.answers else None}


def edge_curves(verb: config.Curve, names: tuple[str, ...]) -> dict[str, Any]:
    """The same of the circuit's edges."""
    settings, opened = settings_of(verb.run), reopen(verb.run, "circuit")
    batches, targets = followed(opened.model, settings, verb.judged)
    run, edges = edge_model(opened)
    clean = [opened.data(step) for step in range(verb.score_batches)]  # type: ignore[misc]
    set_means(run, clean)
    curves = {name: trace_edge_curve(run, EDGE_SCORES[name](run, clean, verb.seed), edges, batches, targets) for name in names}
    return {"run": str(verb.run), "task": settings.task, "basis": settings.basis, "rows": sum(len(batch.ids) for batch in batches),
            "edges": sum(int(mask.sum()) for mask in edges.values()), "curves": {name: asdict(curve) for name, curve in curves.items()}}


def followed(host: Host, settings: config.Prune, judged: int) -> tuple[list[Batch], list[Tensor]]:
    """Batches of tune rows, and the model's logits on them."""
    rows = [(row.prompt, row.completion) for found in tune_rows(named(settings.task), judged).values() for row in found]
    made = Epochs(encode(host.tokenizer, rows, host.config.max_position_embeddings), BATCH, host.tokenizer.eos_token_id, 0)
    batches = [made(step) for step in range(made.per_epoch)]
    with torch.no_grad():
        return batches, [host.model(input_ids=batch.ids).logits for batch in batches]


def compiled(replacement: Replacement, order: dict, components: bool, verb: config.Curve, settings: config.Prune) -> list[dict]:
    """What the best share of the nodes is as a checkpoint, for each share in `COMPILED`: stored parameters, right answers on tune
    rows by task, tokens a second (in turns, batches of 32)."""
    tasks, hosts = named(settings.task), {}
    rows = tune_rows(tasks, verb.answers)
    for share in COMPILED:
        kept = {name: gate.nonzero().flatten() for name, gate in opened(order, share).items()}
        hosts[f"{share:g}"] = compile_circuit(replacement.pruned(kept, components), settings.target)
    with Sandbox() as sandbox:
        right = {name: measure_answers(host, tasks, rows, sandbox) for name, host in hosts.items()}
    times = speed(hosts, [row.prompt for row in next(iter(rows.values()))])
    return [{"share": float(name), "params": parameters(host.model).stored, "tokens_per_second": mean(times[name]).to_json(),
             "right": {task: proportion(sum(found), len(found)).to_json() for task, found in right[name].items()}} for name, host in hosts.items()]


def page(found: dict[str, Any]) -> str:
    """What a person reads."""
    edges = "edges" in found
    what = f"{found['edges']:,} edges of the circuit" if edges else f"{found['nodes']:,} nodes"
    kind = found["basis"] if edges else f"{found['basis']}, {found['attention_nodes']}; {found['parts']}"
    lines = [f"{what} of {found['run']} ({kind}), {found['rows']} rows of the tune split", "",
             f"{'score':12} {'CPR':>6} {'CMD':>6}   faithfulness / KL at " + "  ".join(f"{share:>11.0%}" for share in SHOWN)]
    for name, curve in sorted(found["curves"].items(), key=lambda pair: pair[1]["cmd"]):
        points = {point["share"]: point for point in curve["points"]}
        shown = "  ".join(f"{points[share]['faithfulness']:5.2f}/{points[share]['kl']:5.2f}" for share in SHOWN)
        lines.append(f"{name:12} {curve['cpr']:6.3f} {curve['cmd']:6.3f}   {'':22}{shown}")
    for point in found.get("compiled") or ():
        said = ", ".join(f"{task} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" for task, score in point["right"].items())
        lines += [""] * (point is found["compiled"][0])
        size, pace = point["params"], point["tokens_per_second"]["value"]
        lines.append(f"{point['share']:4.0%} compiled: {size:9,} parameters, {pace:6,.0f} tokens/s, right: {said}")
    said = "Best edges of all targets together kept" if edges else "Best nodes of each site open"
    return "\n".join([
        *lines, "", f"{said}, the others at their means, nothing healed. CPR: area under faithfulness (more is better). CMD:",
        "area between faithfulness and 1 (less is better). KL to the model, nats a completion token."])
