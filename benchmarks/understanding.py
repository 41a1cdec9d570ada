"""How much of a run is understood, and that a wrong hypothesis is rejected.

    python benchmarks/understanding.py RUN              measures the circuit in RUN (of `distill prune`), writes results/understanding.json
    python benchmarks/understanding.py RUN contexts     in longer contexts too, which takes many times as long

What is measured is what `distill understand RUN --holes` (and `--contexts`) prints. The wrong hypothesis: of two features whose tables were accepted
and whose effect is largest, the first is said to compute what the second does, and judged on the same rows by the same rule.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.config_hypotheses import Understand
from distill.rows import tune_rows
from distill.runs import reopen, settings_of
from distill.source import commit
from distill.understand import batched, kept, measure
from evals.tasks import named
from graphs.artifact import read_json
from graphs.graph import index
from graphs.hypotheses.hypothesis import Hypothesis
from graphs.hypotheses.substitution import means
from graphs.hypotheses.verdict import Bench, judge

ROOT = Path(__file__).parent.parent
KEPT = ("line", "target", "kind", "numbers", "evidence")
"""What is kept of a hypothesis: its tables stay in the run."""


def wrong(verb: Understand) -> dict[str, Any]:
    """One feature said to be another. Raises ValueError where fewer than two features have an accepted table."""
    opened = reopen(verb.run, "circuit")
    right = [one for one in kept(opened) if one.evidence.accepted and one.hypothesis.kind == "table" and ".F" in one.hypothesis.target]
    if len(right) < 2:
        raise ValueError(f"--run {verb.run}: fewer than two features have an accepted table")
    first, second = sorted(right, key=lambda one: -one.evidence.ablated)[:2]
    rows = tune_rows(named(settings_of(verb.run).task), verb.judged)
    bench = Bench.of(opened.subject, index(opened.subject.host, opened.subject.basis), means(opened.subject, opened.sample(verb.rows)),
                     batched(opened, [row for found in rows.values() for row in found]), verb.seed)
    judged = judge(bench, Hypothesis(first.hypothesis.target, second.hypothesis.rule))
    return {"target": first.hypothesis.target, "said": second.hypothesis.target, "evidence": asdict(judged.evidence)}


def main(run: Path, contexts: bool) -> None:
    """Measure and write."""
    verb = Understand(run=run, holes=True, contexts=contexts)
    found = measure(verb)
    found = {"commit": commit(), "settings": {key: value for key, value in asdict(verb).items() if key not in ("run", "json")},
             "made": {key: value for key, value in read_json(run / "receipt.json")["config"].items() if key != "out"}} | {
        key: value for key, value in found.items() if key not in ("run", "key")}
    found["hypotheses"] = [{key: one[key][:300] if key == "line" else one[key] for key in KEPT} for one in found["hypotheses"]]
    found["wrong"] = wrong(verb)
    (ROOT / "results" / "understanding.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    print(json.dumps(found["all"], indent=1))


if __name__ == "__main__":
    from words import words

    run, *contexts = words(__doc__, lambda given: bool(given) and given[1:] in ([], ["contexts"]))
    main(Path(run), bool(contexts))
