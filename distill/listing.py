"""`distill listing`: the whole circuit as a program, each value defined before its uses: to read, or (`--code`) to run.

    RUN/listing/circuit.py      one function: a line a node, a function a hypothesis (`graphs.hypotheses.program`); numpy is all it needs
    RUN/listing/circuit.npz     its weights, sample prompts of the test split and their logits

The file is kept only once a fresh process, which sees nothing of this package, has run it and found the logits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from distill.config_hypotheses import Listing
from distill.report import visible
from distill.rows import DEFENDER_SEED
from distill.runs import Opened, inspected, settings_of
from distill.understand import kept
from evals.tasks import named
from graphs.artifact import digest, locked, stage
from graphs.batches import encode
from graphs.equations import Equation, listing
from graphs.graph import FeatureGraph
from graphs.hypotheses.program import program as written

FORMAT = 1
"""Raised when the file changes: older ones are written anew."""


def run(verb: Listing) -> int:
    """Print, or write and run; 1 where a file that was written earlier is no longer the circuit."""
    if verb.code and verb.part != "circuit":
        raise ValueError(f"--part {verb.part}: only a circuit runs by itself (a fitted graph is read inside the model, whose errors no program "
                         "has); give --part circuit")
    opened = inspected(verb)
    graph = opened.edges(verb.rows, verb.enough, verb.memory << 20)
    if verb.code:
        return code(verb, opened, graph)
    lines = listing(graph, verb.parents)
    print(json.dumps([asdict(one) for one in lines]) if verb.json else program(lines, graph, opened))
    return 0


def code(verb: Listing, opened: Opened, graph: FeatureGraph) -> int:
    """Write the file, unless it is there, and run it. Raises ValueError where what was written is not the circuit, or no longer runs."""
    if opened.part != "circuit":
        raise ValueError("--code: only a circuit runs by itself; a fitted graph is read inside the model, whose errors no program has; leave it out")
    tested = kept(opened) if (opened.folder / "hypotheses" / opened.part).is_dir() else []
    accepted = [one for one in tested if one.evidence.accepted]
    rows = [row for task in named(settings_of(verb.run).task) for row in task.rows("test", verb.samples, seed=DEFENDER_SEED)]
    host = opened.model
    samples = encode(host.tokenizer, [(row.prompt, row.completion) for row in rows], host.config.max_position_embeddings)
    folder, arguments = opened.folder / "listing", ["--json"] if verb.json else []
    ran: list[subprocess.CompletedProcess[str]] = []

    def make(out: Path) -> dict:
        made = written(opened.subject, graph, accepted, [torch.tensor(one.ids) for one in samples], verb.parents, f"The circuit of {opened.folder}")
        ran.append(alone(made.save(out), *arguments))
        if ran[0].returncode != 0:
            raise ValueError(f"the written circuit is not the circuit ({_last(ran[0])}); this is a defect, please report it")
        return {"part": opened.part, "hypotheses": len(accepted), "parents": verb.parents, "samples": len(samples)}

    key = digest(opened.key, FORMAT, verb.rows, verb.enough, verb.parents, verb.samples, [one.data() for one in accepted])
    with locked(opened.folder):
        stage(folder, key, make)
    done = ran[0] if ran else alone(folder / "circuit.py", *arguments)
    if done.returncode not in (0, 1) or not done.stdout:
        raise ValueError(f"{folder / 'circuit.py'} no longer runs ({_last(done)}): delete {folder} and run the same command again")
    print(done.stdout.rstrip() if verb.json else f"{folder / 'circuit.py'}, run by itself:\n{done.stdout.rstrip()}")
    return done.returncode


def alone(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a file in a fresh process that sees nothing but installed packages."""
    return subprocess.run([sys.executable, "-I", str(file), *arguments], capture_output=True, text=True)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]


def program(lines: list[Equation], graph: FeatureGraph, opened: Opened) -> str:
    """The circuit as one reads code."""
    said = [f"# {opened.part} of {opened.folder}: {len(lines):,} nodes in order of depth, {graph.tokens:,} clean tokens",
            "# value = gate(coefficient(+-spread)*parent + ... + constant + rest(mean of what is not printed))  # share of the drive printed"]
    layer = None
    for one in lines:
        name = one.node.split(".")[0] if one.kind != "logit" else "logits"
        if name != layer:
            layer = name
            said += ["", f"# ---- {layer}"]
        said.append(f"{visible(one.line())}  # {one.carried:.0%}; active {one.active:.1%}")
    return "\n".join(said)
