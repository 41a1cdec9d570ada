"""`distill understand`: how much of a run is replaced by what we say of it, with nothing lost.

Hypotheses are proposed from clean rows, accepted or rejected on rows of the tune split, and kept under RUN/hypotheses/ with their
evidence. The shares are then measured on rows of the test split and written to RUN/understanding.json (RUN/understanding-graph.json for
`--part graph`), where `distill gate` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config_hypotheses import Understand
from distill.rows import DEFENDER_SEED, tune_rows
from distill.runs import Opened, reopen, settings_of
from distill.surroundings import surroundings
from evals.tasks import Row, named
from graphs.artifact import digest, locked, read_json, stage, write_json
from graphs.batches import Batch, Epochs, encode
from graphs.graph import index
from graphs.hypotheses.holes import holes
from graphs.hypotheses.study import study
from graphs.hypotheses.substitution import Change, means
from graphs.hypotheses.substitution import run as substituted
from graphs.hypotheses.understanding import BUCKETS, GROUPS, NULL, Explained, Prompts, Understanding, score, understanding
from graphs.hypotheses.verdict import Bench, Judged
from graphs.hypotheses.views import Text
from graphs.replace import Replacement
from graphs.scores import fisher

FORMAT = 2
"""Raised when hypotheses change their meaning: older ones are made anew."""
BATCH, LONG, ORDERED = 24, 6, 4
"""Rows a batch, rows a batch in longer contexts, and batches that say which nodes matter."""
COLUMNS = 5
"""Columns of a printed table at most: a page of 150 characters."""


def run(verb: Understand) -> int:
    """Measure, write, print."""
    found = measure(verb)
    write_json(verb.run / named_file(verb.part), found)
    print(json.dumps(found, indent=1) if verb.json else page(found))
    return 0


def named_file(part: str) -> str:
    """Where the numbers of a part are kept."""
    return "understanding.json" if part == "circuit" else f"understanding-{part}.json"


def measure(verb: Understand) -> dict[str, Any]:
    """Everything that `page` shows, as plain data."""
    settings = settings_of(verb.run)
    if settings.basis == "layers":
        raise ValueError(f"--run {verb.run}: it was made with --basis layers, whose nodes are whole layers; give a run of another basis")
    opened = reopen(verb.run, verb.part)
    tested = hypotheses(verb, opened)
    explained = Explained(opened.subject, index(opened.subject.host, opened.subject.basis), means(opened.subject, opened.sample(verb.rows)),
                          [one.hypothesis for one in tested if one.evidence.accepted], dropped(verb, opened))
    rows = {task.name: task.rows("test", verb.prompts, seed=DEFENDER_SEED) for task in named(settings.task)}
    prompts = scored_on(opened, explained, batched(opened, [row for found in rows.values() for row in found]))
    scored = score(explained, prompts, verb.seed)
    whole = understanding(scored, seed=verb.seed)
    assert whole is not None  # a row of a task has a completion
    at, tasks = 0, {}
    for name, found in rows.items():
        tasks[name] = _data(understanding(scored, range(at, at + len(found)), seed=verb.seed))
        at += len(found)
    lengths = {f"{start}+": _data(understanding(scored, bucket=place, seed=verb.seed)) for place, start in enumerate(BUCKETS)}
    contexts: dict[str, Any] = {}
    if verb.contexts:
        for name, texts in surroundings(opened.model, named(settings.task), verb.prompts).items():
            batches = list(Epochs(texts, LONG, opened.model.tokenizer.eos_token_id, 0).once())
            contexts[name] = _data(understanding(score(explained, scored_on(opened, explained, batches), verb.seed), seed=verb.seed))
    members = {name: sum(map(len, sites.values())) for name, sites in explained.members().items()}
    return {"run": str(verb.run), "part": verb.part, "key": opened.key, "task": settings.task, "prompts": verb.prompts, "all": _data(whole),
            "tasks": tasks, "lengths": lengths, "contexts": contexts, "nodes": members, "hypotheses": [one.data() for one in tested],
            "holes": [asdict(one) for one in holes(explained, prompts)] if verb.holes else None}


def _data(found: Understanding | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def hypotheses(verb: Understand, opened: Opened) -> list[Judged]:
    """The run's hypotheses: made once for the same settings, found again under RUN/hypotheses/."""
    folder = verb.run / "hypotheses" / opened.part
    key = digest(opened.key, FORMAT, verb.rows, verb.judged, verb.tested, verb.seed)
    if not (folder / "receipt.json").is_file() or read_json(folder / "receipt.json")["key"] != key:
        tested = propose(verb, opened)

        def make(out: Path) -> dict:
            write_json(out / "hypotheses.json", [one.data() for one in tested])
            return {"of": opened.key, "rows": verb.rows, "judged": verb.judged,
                    "accepted": sum(one.evidence.accepted for one in tested), "tested": len(tested)}

        with locked(verb.run):
            stage(folder, key, make)
    return kept(opened)


def kept(opened: Opened) -> list[Judged]:
    """What `hypotheses` stored. Raises ValueError where nothing was, or where it is about nodes that were made anew since."""
    folder = opened.folder / "hypotheses" / opened.part
    if not (folder / "hypotheses.json").is_file():
        raise ValueError(f"--run {opened.folder}: it holds no hypotheses yet; run distill understand {opened.folder} first")
    if read_json(folder / "receipt.json").get("of") != opened.key:
        raise ValueError(f"--run {opened.folder}: its hypotheses are about an earlier {opened.part}; run distill understand {opened.folder} again")
    return [Judged.read(one) for one in read_json(folder / "hypotheses.json")]


def propose(verb: Understand, opened: Opened) -> list[Judged]:
    """Make and judge hypotheses."""
    assert opened.replacement is not None and opened.data is not None  # a run has both
    subject, sample = opened.subject, opened.sample(verb.rows)
    graph = opened.edges(128, 0.95, 512 << 20)
    rows = tune_rows(named(settings_of(verb.run).task), verb.judged)
    judged = batched(opened, [row for found in rows.values() for row in found])
    bench = Bench.of(subject, graph.index, means(subject, sample), judged, verb.seed)
    order = fisher(opened.replacement, opened.data, ORDERED, True, verb.seed)
    return study(bench, sample, {name: order[name] for name in subject.basis}, verb.tested, graph)


def batched(opened: Opened, rows: Sequence[Row]) -> list[Batch]:
    """Rows as this model reads them, in order."""
    host = opened.model
    texts = encode(host.tokenizer, [(row.prompt, row.completion) for row in rows], host.config.max_position_embeddings)
    return list(Epochs(texts, BATCH, host.tokenizer.eos_token_id, 0).once())


def dropped(verb: Understand, opened: Opened) -> dict[str, Tensor]:
    """Nodes of the fitted graph that the circuit dropped, by site; nothing for a circuit. Raises ValueError where the run does not say."""
    if opened.part == "circuit":
        return {}
    receipt = verb.run / "circuit" / "receipt.json"
    settings = settings_of(verb.run)
    if not receipt.is_file() or settings.start is not None or settings.attention_nodes == "components":
        raise ValueError("--part graph: which of its nodes were dropped is known of runs of distill prune with heads as nodes and without --start; "
                         "give --part circuit")
    found = {}
    for site, nodes in read_json(receipt)["kept"].items():
        count = opened.subject.basis[site].count
        per = 1 if site.endswith(".mlp") else count // opened.replacement.node_counts()[site]  # type: ignore[union-attr]
        gone = torch.ones(count // per, dtype=torch.bool)
        gone[torch.tensor(nodes, dtype=torch.long)] = False
        found[site] = torch.where(gone.repeat_interleave(per))[0]
    return found


@torch.no_grad()
def scored_on(opened: Opened, explained: Explained, batches: Sequence[Batch]) -> list[Prompts]:
    """Batches with the original model's logits; for a circuit also what `error` and `pruned` add."""
    fitted = Replacement.load(opened.folder / "graph", opened.model) if opened.part == "circuit" else None
    found = []
    for batch in batches:
        target, added = opened.model.model(input_ids=batch.ids).logits, {}
        if fitted is not None:
            whole, own = fitted(batch.ids), substituted(opened.subject, batch.ids, Change())
            added = {"error": target - whole, "pruned": whole - own}
        found.append(Prompts(Text.of(batch, explained.nodes.tokens), target, added))
    return found


def page(found: dict[str, Any]) -> str:
    """What a person reads."""
    tasks = found["tasks"].items() if len(found["tasks"]) > 1 else ()  # one task is all
    names = [("all", found["all"]), *tasks, *((f"{name} tokens", row) for name, row in found["lengths"].items() if row),
             *found["contexts"].items()]
    tested = found["hypotheses"]
    accepted = [one for one in tested if not one["evidence"]["why"]]
    whole = sum(one["kind"] in ("look", "head") or (".C" not in one["target"] and ".H" in one["target"]) for one in accepted)
    lines = [f"{found['part']} of {found['run']}: {len(accepted)} of {len(tested)} hypotheses accepted, {whole} of them of whole heads"]
    for start in range(0, len(names), COLUMNS):
        lines += ["", *_shares(found["nodes"], names[start : start + COLUMNS])]
    lines += ["", f"Exact Shapley shares of v = 1 - KL / KL(nothing), {found['all']['nothing']:.3f} nats a token for nothing; "
                  f"{found['prompts']} test rows a task; 95 % intervals.",
              f"Understood: code and equations. Shuffled: must be at most {NULL}. In brackets: nodes. Without: change of v(all)."]
    lines += ["", "accepted, what matters most first"]
    for one in sorted(accepted, key=lambda one: -one["evidence"]["ablated"] * one["evidence"]["recovered"]["value"])[:20]:
        held = one["evidence"]
        lines.append(f"  {held['recovered']['value']:5.2f} of {held['ablated']:.1e} nats, {one['numbers']} numbers  {one['line']}")
    if found["holes"]:
        lines += ["", "holes, largest first (nats a token when it alone is ablated; output: KL from the model to the circuit)"]
        lines += [_hole(one) for one in found["holes"][:15]]
    return "\n".join(lines)


def _shares(nodes: dict[str, int], columns: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """One table of at most `COLUMNS` columns."""
    def line(label: str, key: str, group: str | None = None, sign: int = 1) -> str:
        return f"{label:20} " + " ".join(f"{_cell(row[key] if group is None else row[key][group], sign):>24}" for _, row in columns)

    return [f"{'share of the effect':20} " + " ".join(f"{name:>24}" for name, _ in columns),
            *(line(f"{group} ({nodes[group]})", "shares", group) for group in GROUPS),
            *(line(f"without {group}", "without", group, -1) for group in GROUPS),
            line("together, v(all)", "whole"), line("understood", "understood"), line("shuffled hypotheses", "null")]


def _cell(share: dict[str, float], sign: int = 1) -> str:
    low, high = sorted((sign * share["low"], sign * share["high"]))
    return f"{sign * share['value']:6.3f} [{low:6.3f}, {high:6.3f}]"


def _hole(one: dict[str, Any]) -> str:
    kinds = ", ".join(f"{name} {share:.0%}" for name, share in one["kinds"].items())
    lengths = " ".join(f"{name}: {value:.3f}" for name, value in one["lengths"].items() if value is not None)
    examples = "; ".join(f"{before!r} -> {token!r}" for _, before, token in one["examples"][:2])
    return f"  {one['kl']:.4f}  {one['unit']} ({one['nodes']})  [{lengths}]  {kinds}  e.g. {examples}"


