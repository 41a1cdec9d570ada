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
from distill.rows import tune_rows
from distill.runs import begun
from evals.tasks import named
from graphs.batches import Epochs, encode
from graphs.curve import Curve, trace_curve
from graphs.replace import Replacement
from graphs.scores import SCORES

LEARNED = "gates"
BATCH = 32
SHOWN = (0.01, 0.05, 0.1, 0.2, 0.5)


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
    curves: dict[str, Curve] = {}
    for name in names:
        order = load_file(gated / "gates.safetensors") if name == LEARNED else SCORES[name](
            replacement, data, verb.score_batches, components, verb.seed)
        curves[name] = trace_curve(replacement, order, batches, targets)
    return {"run": str(verb.run), "task": settings.task, "basis": settings.basis,
            "attention_nodes": "components" if components else "heads", "parts": "as gated" if learned else "as fitted",
            "rows": len(rows), "nodes": sum(replacement.node_counts(components).values()),
            "curves": {name: asdict(curve) for name, curve in curves.items()}}


def page(found: dict[str, Any]) -> str:
    """What a person reads."""
    kind = f"{found['basis']}, {found['attention_nodes']}; {found['parts']}"
    lines = [f"{found['nodes']:,} nodes of {found['run']} ({kind}), {found['rows']} rows of the tune split", "",
             f"{'score':12} {'CPR':>6} {'CMD':>6}   faithfulness / KL at " + "  ".join(f"{share:>11.0%}" for share in SHOWN)]
    for name, curve in sorted(found["curves"].items(), key=lambda pair: pair[1]["cmd"]):
        points = {point["share"]: point for point in curve["points"]}
        shown = "  ".join(f"{points[share]['faithfulness']:5.2f}/{points[share]['kl']:5.2f}" for share in SHOWN)
        lines.append(f"{name:12} {curve['cpr']:6.3f} {curve['cmd']:6.3f}   {'':22}{shown}")
    return "\n".join([
        *lines, "", "Best nodes of each site open, the others at their means, nothing healed. CPR: area under faithfulness (more is better). CMD:",
        "area between faithfulness and 1 (less is better). KL to the model, nats a completion token."])
