"""How good a fitted graph is: fidelity by task, sparsity, parents a feature needs, scores with intervals.

    python benchmarks/graph.py RUN          measures the graph in RUN (of `distill fit` or `distill prune`), writes results/graph.json

What is measured is what `distill graph` prints. The drawing of parents goes to docs/parents.svg.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from distill import config
from distill.graph import measure
from distill.source import commit
from graphs.artifact import read_json

ROOT = Path(__file__).parent.parent


def drawing(parents: dict[str, dict[str, float]]) -> str:
    """How many parents carry how much, as SVG."""
    most = max(value for counts in parents.values() for value in counts.values())
    lines, names = [], []

    def height(value: float) -> float:
        return 250 - 210 * math.log2(value + 1) / math.log2(most + 1)

    for kind, counts in parents.items():
        points = [(60 + 380 * float(share), height(value)) for share, value in counts.items()]
        x, y = points[len(points) // 2]
        colour, beside = ("#1769aa", f'x="{x + 6:.1f}" y="{y + 15:.1f}"') if kind == "feature" else (
            "#b3401f", f'x="{x - 6:.1f}" y="{y - 6:.1f}" text-anchor="end"')
        lines.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        names.append(f'<text {beside} fill="{colour}" stroke="white" stroke-width="4" paint-order="stroke">{kind}</text>')
    for share in (0.3, 0.5, 0.8, 0.95):
        lines.append(f'<text x="{60 + 380 * share:.0f}" y="268" text-anchor="middle">{share:.0%}</text>')
    for value in (1, 4, 16, 64, 256):
        y = height(value)
        lines.append(f'<line x1="150" x2="440" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>'
                     f'<text x="142" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 290" font-family="system-ui, sans-serif" font-size="12" fill="#555">'
            + "".join(lines + names) + '<text x="300" y="286" text-anchor="middle">share of the median node\'s absolute drive</text>'
            '<text x="60" y="30">parents</text></svg>\n')


def main(run: Path) -> None:
    """Measure and write."""
    found = measure(config.Graph(run=run))
    settings = read_json(run / "graph" / "receipt.json")["settings"]
    found = {"commit": commit(), "settings": settings} | {key: value for key, value in found.items() if key not in ("run", "config")}
    (ROOT / "results" / "graph.json").write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / "docs" / "parents.svg").write_text(drawing(found["parents"]))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    from words import words

    main(Path(*words(__doc__, lambda given: len(given) == 1)))
