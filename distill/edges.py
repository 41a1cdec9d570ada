"""`distill evaluate --run RUN --as graph|edges|checkpoint`: the circuit of a run judged as it runs, not as it was compiled.

    checkpoint   the dense model that the run wrote
    graph        the circuit node by node, before compiling
    edges        the circuit edge by edge, with a share of its edges (`graphs.edge_run`, `graphs.edge_prune`)

All are judged by the code that judges checkpoints, beside the checkpoint and the clean twin (where there is one), on the same rows, and
timed in turns with them. A cut is made once and found again under RUN/edges/.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill import config
from distill.compile import compile_circuit
from distill.models import find, read_secret, secret_beside
from distill.organism import backdoor_of
from distill.runs import Opened, reopen, settings_of
from evals.evaluate import EvaluateConfig, judge_models
from evals.statistics import ratio
from evals.tasks import named
from graphs.artifact import digest, locked, stage
from graphs.batches import collate
from graphs.edge_prune import ThinConfig, counted, thin
from graphs.edge_run import EdgeModel, Edges
from graphs.host import Host
from graphs.processes import agreed
from graphs.targets import Targets

FORMAT = 1
"""Raised when what a cut stores changes its meaning: older ones are made anew."""


def edge_model(opened: Opened) -> tuple[EdgeModel, Edges]:
    """A run's circuit edge by edge, all edges kept, and which pairs are counted as edges."""
    assert opened.replacement is not None and opened.data is not None
    run = EdgeModel(opened.replacement)
    seen = torch.tensor(sorted({token for row in opened.data.rows for token in row.ids}))
    return run, counted(run, seen)


def cut(opened: Opened, settings: ThinConfig) -> tuple[EdgeModel, dict[str, Any]]:
    """The run with a share of its edges, made once; and the receipt: edges kept and all, by kind, and losses."""
    run, edges = edge_model(opened)
    assert opened.data is not None

    def make(out: Path) -> dict:
        losses = thin(run, Targets(opened.model, opened.data), edges, settings)  # type: ignore[arg-type]
        agreed(lambda: run.save(out))
        return {"settings": asdict(settings), "losses": losses, "kept": tally(run, edges)}

    name = f"{settings.score}-{settings.share:g}" + (f"-{settings.steps}" if settings.steps else "")
    with locked(opened.folder):
        receipt, _ = stage(opened.folder / "edges" / name, digest(opened.key, settings, FORMAT), make)
    run.restore(opened.folder / "edges" / name)
    return run, receipt


def tally(run: EdgeModel, edges: Edges) -> dict[str, list[int]]:
    """Edges kept, and all, by kind of source and of target: "token to feature", ..., and "all"."""
    found: dict[str, list[int]] = {"all": [0, 0]}
    for name, mask in edges.items():
        kept, target = run.readers[name].kept & mask, "logit" if name == "logits" else _kind(name)
        for column, where in run.columns().items():
            if where.stop > mask.shape[1]:
                continue
            pair = [int(kept[:, where].sum()), int(mask[:, where].sum())]
            source = "token" if column == "token" else _kind(column)
            for key in (f"{source} to {target}", "all"):
                found[key] = [a + b for a, b in zip(found.get(key, [0, 0]), pair, strict=True)]
    return found


def _kind(name: str) -> str:
    return "feature" if name.endswith("mlp") else "component"


def exactness(opened: Opened) -> dict[str, float]:
    """Max |logit difference| between the run with every edge and the compiled checkpoint on clean rows: in float64, where the order of sums
    hardly counts (the library takes norms in float32 there too), and in float32; and how far the checkpoint in float32 is from itself in
    float64; and the largest |logit|."""
    assert opened.replacement is not None and opened.data is not None
    batch = collate(opened.data.rows[:32], opened.data.pad)
    run, dense = EdgeModel(opened.replacement), compile_circuit(opened.replacement)
    host = run.host()
    with torch.no_grad():
        narrow, plain = (one.model(input_ids=batch.ids).logits[batch.real] for one in (host, dense))
        run.thaw()
        run.double()
        dense.model.double()  # type: ignore[no-untyped-call]
        exact, wide = (one.model(input_ids=batch.ids).logits[batch.real] for one in (run.host(), dense))
    return {"float64": float((exact - wide).abs().max()), "float32": float((narrow - plain).abs().max()),
            "checkpoint_float32": float((plain - wide).abs().max()), "largest_logit": float(wide.abs().max())}


def judge(verb: config.Evaluate) -> dict[str, Any]:
    """Judge a run as `verb.as_` says."""
    assert verb.run is not None and verb.as_ is not None
    settings = settings_of(verb.run)
    model, checkpoint = find(settings.model), verb.run / "checkpoint"
    folder = verb.secret or secret_beside(model)
    secret = read_secret(folder) if folder else None
    shown: Host | Path = checkpoint
    receipt: dict[str, Any] | None = None
    if verb.as_ != "checkpoint":
        opened = reopen(verb.run, "circuit")
        assert opened.replacement is not None
        shown = opened.replacement.host()
        if verb.as_ == "edges":
            first = settings.fitting + settings.gate_steps
            run, receipt = cut(opened, ThinConfig(verb.edges, verb.edge_score, verb.edge_steps, first, verb.seed))
            shown = run.host()
    tasks = named(settings.task)
    backdoor = backdoor_of(secret, tasks)
    models: dict[str, Host | Path] = {"twin" if secret and secret.twin else "model": secret.twin if secret and secret.twin else model}
    reference = next(iter(models))
    models[verb.as_] = shown
    models["checkpoint"] = checkpoint
    asked = EvaluateConfig(prompts=verb.prompts, other_prompts=min(200, verb.prompts))
    judged = judge_models(models, reference, tasks, [], backdoor, asked, verb.run / ".work" / "judged")
    slower = None if verb.as_ == "checkpoint" else ratio(judged["rows"]["checkpoint"]["speed"], judged["rows"][verb.as_]["speed"]).to_json()
    return judged | {"as": verb.as_, "edges": receipt and receipt["kept"], "settings": receipt and receipt["settings"], "slower": slower}


def page(judged: dict[str, Any], than: str = "the checkpoint") -> str:
    """What a person reads. than: which model a token's time is compared with."""
    lines = []
    if judged["edges"]:
        lines += [f"{'edges kept':>28} {'of':>10}", *(f"{key:18} {kept:9,} {all_:10,} {kept / max(1, all_):6.1%}" for key, (kept, all_) in
                                                      judged["edges"].items()), ""]
    for name, one in judged["models"].items():
        against, of = judged["against"].get(name), f" of the {judged['reference']}'s"
        for task, row in one["tasks"].items():
            kept = against and against["tasks"][task]["retention"]
            lines.append(f"{name:10} {task} {_cell(row['score'])}" + (f", {_cell(kept)}{of}" if kept else ""))
        for rate in ("right_under_trigger", "attack_success", "attack_success_sampled", "false_trigger"):
            if one["backdoor"] and one["backdoor"][rate]:
                kept = against and rate == "right_under_trigger" and against["backdoor"]["right_under_trigger_retention"]
                lines.append(f"{name:10} {rate} {_cell(one['backdoor'][rate])}" + (f", {_cell(kept)}{of}" if kept else ""))
        lines.append(f"{name:10} {1e6 / one['speed']['value']:.0f} microseconds a token (batches of 32)")
    if judged["slower"]:
        lines += ["", f"A token takes {_cell(judged['slower'])} times as long as from {than}."]
    return "\n".join(lines)


def _cell(score: dict[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
