"""What sparsity costs: FVU against L0 of the MLPs' transcoders, with and without a linear skip.

    python benchmarks/frontier.py          fits the default organism's MLPs once a setting, writes results/frontier.json and docs/frontier.svg

Local fits of 400 batches on the defender's rows of all three tasks, attention left alone; FVU and L0 are means over the MLPs, on
rows of the tune split. A setting that is in the file already is not fitted again.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from distill.models import CLEAN_ROWS, find
from distill.rows import batches, read, tune_rows
from evals.tasks import named
from graphs.artifact import write_text
from graphs.batches import Epochs, encode
from graphs.fit import FitConfig, fit, quality
from graphs.host import load
from graphs.targets import Targets

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "frontier.json"
SPARSITIES = (0.0, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SKIPS = (0, 16)
COLOURS = ("#1769aa", "#b3401f")


def across(l0: float) -> float:
    """Place of an L0, from 8 to 256."""
    return 60 + 380 * math.log2(l0 / 8) / 5


def up(fvu: float) -> float:
    """Place of a FVU, from 4 to 16 %."""
    return 250 - 210 * math.log2(fvu / 0.04) / 2


def drawing(rows: list[dict], chosen: float) -> str:
    """FVU against L0 as SVG, both on logarithmic axes; the default sparsity is filled."""
    def place(row: dict) -> tuple[float, float]:
        return across(row["l0"]), up(row["fvu"])

    lines = []
    for skip, colour in zip(SKIPS, COLOURS, strict=True):
        mine = sorted((row for row in rows if row["skip"] == skip), key=lambda row: row["l0"])
        points = [place(row) for row in mine]
        lines.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{colour}" fill="{colour if row["sparsity"] == chosen else "white"}"/>'
                  for row, (x, y) in zip(mine, points, strict=True)]
        x, y = points[-1]
        lines.append(f'<text x="{x:.1f}" y="{y - 8 + 24 * (skip > 0):.1f}" fill="{colour}" text-anchor="end">'
                     f'{f"with a skip of rank {skip}" if skip else "no skip"}</text>')
    lines += [f'<text x="{across(l0):.0f}" y="268" text-anchor="middle">{l0}</text>' for l0 in (8, 16, 32, 64, 128, 256)]
    lines += [f'<text x="52" y="{up(fvu) + 4:.0f}" text-anchor="end">{fvu:.0%}</text>' for fvu in (0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.16)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 290" font-family="system-ui, sans-serif" font-size="12" fill="#555">'
            + "".join(lines) + '<text x="250" y="286" text-anchor="middle">L0, mean over layers</text><text x="60" y="28">FVU</text></svg>\n')


def main() -> None:
    """Fit what is missing, draw."""
    tasks, host = named("coding,math,stories"), load(find("builtin:organism"))
    data, _ = batches(host, read(CLEAN_ROWS, tasks), 24, 0)
    held = [(row.prompt, row.completion) for rows in tune_rows(tasks, 128).values() for row in rows]
    judged = Epochs(encode(host.tokenizer, held), 32, host.tokenizer.eos_token_id, 0)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for skip in SKIPS:
        for sparsity in SPARSITIES:
            if any((row["skip"], row["sparsity"]) == (skip, sparsity) for row in rows):
                continue
            config = FitConfig(joint_steps=0, sparsity=sparsity, skip=skip, attention="kept")
            fitted, _ = fit(Targets(host, data), config)
            sites = [site for site in quality(host, fitted, judged, judged.per_epoch)["sites"] if site["l0"] is not None]
            rows.append({"skip": skip, "sparsity": sparsity, "features": config.features, "d_model": host.config.hidden_size,
                         "steps": config.local_steps, "fvu": sum(site["fvu"] for site in sites) / len(sites),
                         "l0": sum(site["l0"] for site in sites) / len(sites),
                         "dead": sum(site["dead"] for site in sites)})
            write_text(RESULTS, json.dumps(rows, indent=1) + "\n")
            print(rows[-1], file=sys.stderr)
    (ROOT / "docs" / "frontier.svg").write_text(drawing(rows, FitConfig().sparsity))


if __name__ == "__main__":
    from words import words

    words(__doc__, lambda given: not given)
    main()
