"""How good a fitted graph is: fidelity by task, sparsity, parents a feature needs, scores with intervals.

    python benchmarks/graph.py RUN          measures the graph in RUN (of `distill fit` or `distill prune`), writes results/graph.json

KL is between the model and itself with every MLP and attention layer swapped for its dictionary, no error nodes, a
completion token, on rows of the tune split. Parents: how many of a feature's parents carry a share of its absolute drive on
clean tokens. Replacement and completeness: circuit-tracer's definitions over all nodes, for the first token of the answer,
a mean over prompts with its 95 % interval.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from distill import config
from distill.rows import tune_rows
from distill.runs import reopen
from evals.statistics import mean
from evals.tasks import named
from graphs.artifact import read_json
from graphs.batches import Epochs, encode
from graphs.fit import quality
from graphs.influence import influence, likely
from graphs.replace import Replacement

ROOT = Path(__file__).parent.parent
PROMPTS, ROWS = 48, 192
SHARES = (0.5, 0.8, 0.9, 0.95)


def main(run: Path) -> None:
    """Measure and write."""
    settings = read_json(run / "graph" / "receipt.json")["settings"]
    opened = reopen(run, "graph")
    host = opened.subject.host
    replacement = Replacement.load(run / "graph", host)
    tasks = named(read_json(run / "receipt.json")["config"]["task"])
    found: dict = {"commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
                   "settings": settings, "d_model": host.config.hidden_size, "tasks": {}}
    for name, rows in tune_rows(tasks, ROWS).items():
        texts = encode(host.tokenizer, [(row.prompt, row.completion) for row in rows])
        batches = Epochs(texts, 32, host.tokenizer.eos_token_id, 0)
        measured = quality(host, replacement, batches, ROWS // 32)
        scores = []
        for row in texts[:PROMPTS]:
            seen = opened.subject.trace(torch.tensor([row.ids[: row.prompt]]))
            flows = influence(opened.subject, seen, likely(seen))
            scores.append((flows.replacement, flows.completeness))
        replaced, complete = (mean(values).to_json() for values in zip(*scores, strict=True))
        found["tasks"][name] = {"kl": measured["kl_swapped"], "l0": {s["name"]: s["l0"] for s in measured["sites"] if s["l0"] is not None},
                                "fvu": {s["name"]: s["fvu"] for s in measured["sites"]}, "replacement": replaced, "completeness": complete}
    started = time.monotonic()
    graph = opened.edges(config.Inspect().rows, config.Inspect().enough, config.Inspect().memory << 20)
    found |= {"build_seconds": time.monotonic() - started, "edges": len(graph.src), "parents": {}}
    for kind in ("feature", "attention"):
        counts: dict[float, list[int]] = {share: [] for share in SHARES}
        for block in graph.index.blocks:
            for node in range(block.start, block.start + block.count) if block.kind == kind else ():
                shares = graph.share[graph.into(node)]
                for share in SHARES if len(shares) else ():
                    counts[share].append(int((shares.cumsum(0) < share - 1e-6).sum()) + 1)
        found["parents"][kind] = {str(share): float(torch.tensor(values, dtype=torch.float64).median()) for share, values in counts.items()}
    (ROOT / "results" / "graph.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/graph.py RUN")
    main(Path(sys.argv[1]))
