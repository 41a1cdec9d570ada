"""How good a fitted graph is: fidelity by task, sparsity, parents a feature needs, scores with intervals.

    python benchmarks/graph.py RUN          measures the graph in RUN (of `distill fit` or `distill prune`), writes results/graph.json

KL is between the model and itself with every MLP and attention layer swapped for its dictionary, no error nodes, a
completion token, on rows of the tune split. Parents: how many of a feature's parents carry a share of its absolute drive on
clean tokens. Replacement and completeness: circuit-tracer's definitions over all nodes, for the first token of the answer,
a mean over prompts with its 95 % interval. By position: KL of every token, rows packed end to end into contexts longer than
any that the graph was fitted on. The drawing goes to docs/parents.svg.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from distill import config
from distill.rows import tune_rows
from distill.runs import reopen
from evals.statistics import mean
from evals.tasks import named
from graphs.artifact import read_json
from graphs.batches import Epochs, encode, packed
from graphs.fit import quality
from graphs.host import Host
from graphs.influence import influence, likely
from graphs.replace import Replacement

ROOT = Path(__file__).parent.parent
PROMPTS, ROWS = 48, 192
SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PLACES = (0, 1, 16, 64, 128, 256, 512)
"""Ends of the buckets of positions; the first holds BOS alone."""


@torch.no_grad()
def by_position(host: Host, replacement: Replacement, rows: list, contexts: int = 8) -> dict[str, float]:
    """KL in nats a token by position, over packed rows."""
    long = [row for row in packed(rows, contexts, PLACES[-1]) if len(row.ids) > PLACES[-2]]
    totals: dict[str, list[float]] = {}
    for row in long:
        ids = torch.tensor([row.ids])
        p, q = (logits[0].log_softmax(-1) for logits in (host.model(input_ids=ids).logits, replacement(ids)))
        kl = (p.exp() * (p - q)).sum(-1)
        for first, end in pairwise(PLACES):
            totals.setdefault("BOS" if end == 1 else f"{first} to {end - 1}", []).append(float(kl[first:end].mean()))
    return {name: sum(values) / len(values) for name, values in totals.items()}


def drawing(parents: dict[str, dict[str, float]]) -> str:
    """How many parents carry how much, as SVG."""
    most = max(value for counts in parents.values() for value in counts.values())
    lines = []

    def height(value: float) -> float:
        return 250 - 210 * math.log2(value + 1) / math.log2(most + 1)

    for kind, counts in parents.items():
        points = " ".join(f"{60 + 380 * float(share):.1f},{height(value):.1f}" for share, value in counts.items())
        x, y = map(float, points.split()[1].split(","))
        colour, below = ("#1769aa", 18) if kind == "feature" else ("#b3401f", -10)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
                     f'<text x="{x:.1f}" y="{y + below:.1f}" fill="{colour}" text-anchor="middle">{kind}</text>')
    for share in (0.3, 0.5, 0.8, 0.95):
        lines.append(f'<text x="{60 + 380 * share:.0f}" y="268" text-anchor="middle">{share:.0%}</text>')
    for value in (1, 4, 16, 64, 256):
        y = height(value)
        lines.append(f'<line x1="150" x2="440" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>'
                     f'<text x="142" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 290" font-family="system-ui, sans-serif" font-size="12" fill="#555">'
            + "".join(lines) + '<text x="300" y="286" text-anchor="middle">share of the median node\'s absolute drive</text>'
            '<text x="60" y="30">parents</text></svg>\n')


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
    rows = encode(host.tokenizer, [(row.prompt, row.completion) for rows in tune_rows(tasks, 60).values() for row in rows])
    found["by_position"] = by_position(host, replacement, rows)
    assert opened.data is not None
    found["longest"] = max(len(row.ids) for row in opened.data.rows)
    started = time.monotonic()
    graph = opened.edges(config.Flow().rows, config.Flow().enough, config.Flow().memory << 20)
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
    (ROOT / "docs" / "parents.svg").write_text(drawing(found["parents"]))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/graph.py RUN")
    main(Path(sys.argv[1]))
