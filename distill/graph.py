"""`distill graph`: how good a run's graph is, before anyone believes what it says.

    KL                         between the model and itself with every site swapped for its dictionary, no error nodes, a completion
                               token, on rows of the tune split
    FVU, L0                    by site, on the same rows
    replacement, completeness  circuit-tracer's scores over all nodes, for the first token of the answer; means over prompts
    by position                KL a token, rows packed end to end into contexts longer than any that the graph was fitted on
    parents                    how many carry a share of a node's absolute drive on clean tokens; medians over nodes
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import torch

from distill import config
from distill.rows import tune_rows
from distill.runs import Opened, inspected
from evals.statistics import mean
from evals.tasks import named
from graphs.artifact import read_json
from graphs.batches import Encoded, Epochs, encode, packed
from graphs.fit import quality
from graphs.graph import FeatureGraph
from graphs.host import Host
from graphs.influence import influence, likely
from graphs.replace import Replacement

BATCH = 32
SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PLACES = (0, 1, 16, 64, 128, 256, 512)
"""Ends of the buckets of positions; the first holds BOS alone."""


def run(verb: config.Graph) -> int:
    """Measure and print."""
    if verb.model is not None:
        raise ValueError("--model: a graph's quality is measured on the clean rows of a run; give --run")
    found = measure(verb)
    print(json.dumps(found, indent=1) if verb.json else page(found))
    return 0


def measure(verb: config.Graph) -> dict[str, Any]:
    """Every number that `page` shows, as plain data."""
    opened = inspected(verb)
    made = read_json(verb.run / "receipt.json")["config"]
    host, replacement = opened.model, opened.replacement
    assert replacement is not None and opened.data is not None  # `run` refuses a bare model
    rows = {name: encode(host.tokenizer, [(row.prompt, row.completion) for row in found], host.config.max_position_embeddings)
            for name, found in tune_rows(named(made["task"]), verb.judged).items()}
    found: dict[str, Any] = {"run": str(verb.run), "part": verb.part, "d_model": host.config.hidden_size, "config": made,
                             "tasks": {name: of_task(opened, replacement, texts, verb.prompts) for name, texts in rows.items()}}
    found["by_position"] = by_position(host, replacement, [row for texts in rows.values() for row in texts[:60]])
    found["longest"] = max(len(row.ids) for row in opened.data.rows)
    started = time.monotonic()
    graph = opened.edges(verb.rows, verb.enough, verb.memory << 20)
    return found | {"edges_seconds": time.monotonic() - started, "edges": len(graph.src), "parents": parents(graph)}


def of_task(opened: Opened, replacement: Replacement, texts: list[Encoded], prompts: int) -> dict[str, Any]:
    """Fidelity, sparsity and scores on one task's rows."""
    host = opened.model
    measured = quality(host, replacement, Epochs(texts, BATCH, host.tokenizer.eos_token_id, 0), max(1, len(texts) // BATCH))
    scores = []
    for row in texts[:prompts]:
        seen = opened.subject.trace(torch.tensor([row.ids[: row.prompt]]))
        flows = influence(opened.subject, seen, likely(seen))
        scores.append((flows.replacement, flows.completeness))
    replaced, complete = (mean(values).to_json() for values in zip(*scores, strict=True))
    return {"kl": measured["kl_swapped"], "ce_gap": measured["ce_swapped"] - measured["ce_model"],
            "l0": {site["name"]: site["l0"] for site in measured["sites"] if site["l0"] is not None},
            "dead": sum(site["dead"] or 0 for site in measured["sites"]),
            "fvu": {site["name"]: site["fvu"] for site in measured["sites"]}, "replacement": replaced, "completeness": complete}


@torch.no_grad()
def by_position(host: Host, replacement: Replacement, rows: list[Encoded], contexts: int = 8) -> dict[str, float]:
    """KL in nats a token by position, over packed rows; as far as the model's context and the rows go."""
    context = min(PLACES[-1], host.config.max_position_embeddings)
    totals: dict[str, list[float]] = {}
    for row in packed(rows, contexts, context):
        ids = torch.tensor([row.ids])
        p, q = (logits[0].log_softmax(-1) for logits in (host.model(input_ids=ids).logits, replacement(ids)))
        kl = (p.exp() * (p - q)).sum(-1)
        for first, end in pairwise(PLACES):
            if first < len(kl):
                totals.setdefault("BOS" if end == 1 else f"{first} to {end - 1}", []).append(float(kl[first:end].mean()))
    return {name: sum(values) / len(values) for name, values in totals.items()}


def parents(graph: FeatureGraph) -> dict[str, dict[str, float]]:
    """Median number of parents that carry each of `SHARES` of a node's absolute drive, by kind of node."""
    found = {}
    for kind in ("feature", "attention"):
        counts: dict[float, list[int]] = {share: [] for share in SHARES}
        for block in graph.index.blocks:
            for node in range(block.start, block.start + block.count) if block.kind == kind else ():
                shares = graph.share[graph.into(node)]
                for share in SHARES if len(shares) else ():
                    counts[share].append(int((shares.cumsum(0) < share - 1e-6).sum()) + 1)
        found[kind] = {str(share): float(torch.tensor(values, dtype=torch.float64).median()) for share, values in counts.items() if values}
    return found


def page(found: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"{found['part']} of {found['run']}", "", f"{'task':8} {'KL':>8} {'CE gap':>8} {'replacement':>22} {'completeness':>22}  L0 by layer"]
    for name, row in found["tasks"].items():
        scores = [f"{row[key]['value']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]" for key in ("replacement", "completeness")]
        lines.append(f"{name:8} {row['kl']:8.4f} {row['ce_gap']:8.4f} {scores[0]:>22} {scores[1]:>22}  "
                     + " / ".join(f"{value:.0f}" for value in row["l0"].values()))
    worst = {name: max(row["fvu"][name] for row in found["tasks"].values()) for name in next(iter(found["tasks"].values()))["fvu"]}
    lines += ["", "FVU, worst task: " + ", ".join(f"{name} {value:.3f}" for name, value in worst.items())]
    lines += ["KL by position:  " + ", ".join(f"{name} {value:.3f}" for name, value in found["by_position"].items())
              + f" (longest fitted row: {found['longest']} tokens)"]
    for kind, counts in found["parents"].items():
        said = ", ".join(f"{float(share):.0%} of its drive {count:.0f}" for share, count in counts.items())
        lines.append(f"parents of the median {kind}: {said}")
    return "\n".join([
        *lines, "", "KL: nats a completion token, every site swapped for its dictionary, no error nodes. Replacement: influence that starts in",
        "tokens rather than in errors. Completeness: influence-weighted share of parents that are no errors."])
