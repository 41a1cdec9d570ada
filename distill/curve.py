"""`distill curve`: which score finds the nodes that carry a task, from none of a run's nodes to all.

Every score ranks the nodes of the same graph: the parts as they were when the run's gates had been learned (the fitted graph, where
those are gone). Rows are of the tune split.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from distill import config
from distill.compile import compile_circuit
from distill.rows import tune_rows
from distill.runs import begun
from distill.search import measure as measure_answers
from evals.sandbox import Sandbox
from evals.size import parameters, speed
from evals.statistics import mean, proportion
from evals.tasks import named
from graphs.batches import Epochs, encode
from graphs.curve import opened, trace_curve
from graphs.replace import Replacement
from graphs.scores import SCORES

LEARNED = "gates"
BATCH = 32
SHOWN = (0.01, 0.05, 0.1, 0.2, 0.5)
COMPILED = (0.1, 0.2, 0.5, 1.0)
"""Shares that are compiled, with --answers."""


def run(verb: config.Curve) -> int:
    """Measure and print."""
    names = tuple(name.strip() for name in verb.score.split(","))
    unknown = [name for name in names if name not in (*SCORES, LEARNED)]
    if unknown:
        raise ValueError(f"--score {unknown[0]}: no such score; choose from {', '.join((LEARNED, *SCORES))}")
    found = measure(verb, names)
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
    rows = [(row.prompt, row.completion) for found in tune_rows(named(settings.task), verb.judged).values() for row in found]
    judged = Epochs(encode(host.tokenizer, rows, host.config.max_position_embeddings), BATCH, host.tokenizer.eos_token_id, 0)
    batches = [judged(step) for step in range(judged.per_epoch)]
    with torch.no_grad():
        targets = [host.model(input_ids=batch.ids).logits for batch in batches]
    orders = {name: load_file(gated / "gates.safetensors") if name == LEARNED else SCORES[name](
        replacement, data, verb.score_batches, components, verb.seed) for name in names}
    curves = {name: trace_curve(replacement, order, batches, targets) for name, order in orders.items()}
    return {"run": str(verb.run), "task": settings.task, "basis": settings.basis,
            "attention_nodes": "components" if components else "heads", "parts": "as gated" if learned else "as fitted",
            "rows": len(rows), "nodes": sum(replacement.node_counts(components).values()),
            "curves": {name: asdict(curve) for name, curve in curves.items()},
            "compiled": compiled(replacement, orders[names[0]], components, verb, settings) if verb.answers else None}


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
    kind = f"{found['basis']}, {found['attention_nodes']}; {found['parts']}"
    lines = [f"{found['nodes']:,} nodes of {found['run']} ({kind}), {found['rows']} rows of the tune split", "",
             f"{'score':12} {'CPR':>6} {'CMD':>6}   faithfulness / KL at " + "  ".join(f"{share:>11.0%}" for share in SHOWN)]
    for name, curve in sorted(found["curves"].items(), key=lambda pair: pair[1]["cmd"]):
        points = {point["share"]: point for point in curve["points"]}
        shown = "  ".join(f"{points[share]['faithfulness']:5.2f}/{points[share]['kl']:5.2f}" for share in SHOWN)
        lines.append(f"{name:12} {curve['cpr']:6.3f} {curve['cmd']:6.3f}   {'':22}{shown}")
    for point in found["compiled"] or ():
        said = ", ".join(f"{task} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" for task, score in point["right"].items())
        lines += [""] * (point is found["compiled"][0])
        size, pace = point["params"], point["tokens_per_second"]["value"]
        lines.append(f"{point['share']:4.0%} compiled: {size:9,} parameters, {pace:6,.0f} tokens/s, right: {said}")
    return "\n".join([
        *lines, "", "Best nodes of each site open, the others at their means, nothing healed. CPR: area under faithfulness (more is better). CMD:",
        "area between faithfulness and 1 (less is better). KL to the model, nats a completion token."])
