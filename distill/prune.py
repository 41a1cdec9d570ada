"""`distill prune` (and `distill fit`): a model goes in, the circuit of a task comes out as an ordinary checkpoint.

    find model -> clean rows -> fit -> gates -> choose, prune, heal -> compile, prove, reload -> judge -> report

The organism's secret is looked up only after the checkpoint is on disk.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from distill import config, stages, synthetic
from distill.job import prepare
from distill.judgement import judge, report
from distill.models import find, read_secret, secret_beside
from distill.plan import plan
from distill.report import write
from distill.rows import clean
from distill.start import inherited, take_over
from distill.table import table
from evals.tasks import named
from graphs.artifact import digest, locked, write_json
from graphs.processes import agreed


def run(verb: config.Fit) -> int:
    """Run the verb; returns 0, or 1 where a gate failed."""
    if isinstance(verb, config.Prune):
        verb = inherited(verb)
    tasks = named(verb.task)
    model = find(verb.model)
    if isinstance(verb, config.Prune) and verb.dry_run:
        agreed(lambda: print(plan(model, clean(verb.rows, tasks), verb)))
        return 0
    with locked(verb.out):
        if isinstance(verb, config.Prune):
            agreed(partial(take_over, verb))
        job = prepare(model, synthetic.rows(verb, model, tasks), tasks, verb, len(clean(verb.rows, tasks)))
        if not isinstance(verb, config.Prune):
            receipt = stages.graph_stage(job, model)
            agreed(lambda: write_json(verb.out / "receipt.json", {"config": asdict(verb), "keys": {"graph": receipt["key"]}}))
            print(fit_table(receipt["quality"], verb.out / "graph"))
            return 0
        times: list[dict] = []
        return finish(verb, model, tasks, stages.road(job, model, verb, times), times)


def finish(verb: config.Prune, model: Path, tasks: list, receipts: dict, times: list[dict]) -> int:
    """Judge, and conclude."""
    secret = secret_beside(model)
    started = time.monotonic()
    judged = judge(verb.out, model, read_secret(secret) if secret else None, tasks, verb)
    times.append({"name": "evaluate", "seconds": time.monotonic() - started, "cached": False})
    return agreed(lambda: conclude(verb, model, tasks, receipts, times, judged))


def conclude(verb: config.Prune, model: Path, tasks: list, receipts: dict, times: list[dict], judged: dict) -> int:
    """Write the report, print its summary."""
    made = report(judged, receipts, verb, tasks, times, verb.name or verb.out.name, digest(model))
    write_json(verb.out / "judged.json", judged)
    write(made, verb.out)
    facts = {key: made[key] for key in ("command", "commit", "versions", "config")}
    write_json(verb.out / "receipt.json", facts | {"keys": {k: v["key"] for k, v in receipts.items() if isinstance(v, dict)}})
    print(json.dumps(made["summary"], indent=1) if verb.json else table(made | {"folder": str(verb.out)}))
    return 0 if all(gate["passed"] is not False for gate in made["gates"]) else 1


def fit_table(quality: dict, folder: Path) -> str:
    """What `distill fit` prints."""
    lines = [f"{'site':14} {'FVU':>8} {'L0':>7} {'dead':>6} {'nodes':>6}"]
    for site in quality["sites"]:
        l0, dead = ("-", "-") if site["l0"] is None else (f"{site['l0']:.1f}", str(site["dead"]))
        lines.append(f"{site['name']:14} {site['fvu']:8.4f} {l0:>7} {dead:>6} {site['features']:6d}")
    lines.append(f"all swapped in, no error nodes: KL {quality['kl_swapped']:.4f} nats a completion token, "
                 f"CE {quality['ce_swapped']:.4f} (model {quality['ce_model']:.4f})")
    return "\n".join([*lines, f"graph in {folder}"])
