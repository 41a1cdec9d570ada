"""`distill prune --dry-run`: what a run would do and need, before anything is loaded or written.

Batches and tokens are counted on the rows as this model's tokenizer splits them; synthetic rows, which are not written yet, as if they were
clean ones. Parameters are counted on the model's shapes. Memory is a
lower bound: what this process holds with the libraries loaded; float32 weights; weights, gradients and AdamW's two moments of what is
trained; the model's own logits on all rows, where they are kept; and of one batch the logits (twice, with a gradient) and what a backward
pass keeps of each layer. Judging, and the holes of the allocator, come on top: the default command's peak (results/summaries.jsonl) is two
to three times the bound.

Disk is what the finished folder holds, with the training state that is there while it is made. Seconds depend on the machine
and on what else it does, and are not estimated.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

from distill import config
from distill.compile import home
from distill.job import fit_settings
from distill.rows import batches
from evals.size import held
from graphs.batches import Epochs
from graphs.host import Host, skeleton
from graphs.targets import BUDGET

FLOAT = 4
"""Bytes of a float32."""
TRAINED = 4
"""Tensors that training holds of each trained weight: itself, its gradient, AdamW's two moments."""
KEPT = 12
"""Tensors of the model's width that a backward pass keeps of each layer and token, about."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run. batches, tokens: None where they depend on what earlier stages find."""

    name: str
    does: str
    batches: int | None
    tokens: int | None


def plan(model: Path, texts: Sequence[tuple[str, str]], verb: config.Prune) -> str:
    """The plan as text, or JSON. Raises ValueError where the model cannot be pruned at all, or a row does not fit its context."""
    host = skeleton(model)
    becomes = home(host.model, verb.target, verb.basis != "features", verb.attention == "kept")
    data, rows = batches(host, [*texts, *islice(cycle(texts), verb.synthetic_rows)], verb.batch, verb.seed)
    found = stages(data, verb)
    lengths, held_most, written = [len(row.ids) for row in rows], memory(host, data, verb), disk(host, verb)
    facts = {"model": type(host.model).__name__, "parameters": host.model.num_parameters(), "checkpoint": becomes, "rows": len(texts),
             "synthetic_rows": verb.synthetic_rows,
             "row_tokens": sum(lengths), "longest_row": max(lengths), "trained_parameters": trained(host, verb),
             "memory_bytes": held_most, "disk_bytes": written, "seconds": None}
    if verb.json:
        return json.dumps(facts | {"stages": [asdict(stage) for stage in found]}, indent=1)
    written_too = f" and {verb.synthetic_rows:,} synthetic ones, taken to be as long," if verb.synthetic_rows else ""
    lines = [f"{facts['model']}, {facts['parameters']:,} parameters, into {becomes}; {facts['rows']:,} clean rows{written_too} of "
             f"{facts['row_tokens']:,} tokens, "
             f"the longest {facts['longest_row']:,}", "", f"{'stage':10} {'batches':>8} {'tokens':>12}  what"]
    for stage in found:
        lines.append(f"{stage.name:10} {_count(stage.batches):>8} {_count(stage.tokens):>12}  {stage.does}")
    return "\n".join([*lines, "", f"trained at once: {facts['trained_parameters']:,} parameters", f"memory: at least {_size(held_most)}",
                      f"disk: about {_size(written)} in {verb.out}", "time: not estimated", "nothing was written (--dry-run)"])


def stages(data: Epochs, verb: config.Prune) -> list[Stage]:
    """The stages with their batches and tokens, as `distill.stages` and `distill.search` count them."""
    fitted = 0 if verb.start else verb.fitting
    gated = 0 if verb.start else verb.gate_steps
    before = verb.fitting + verb.gate_steps
    first = data.steps(verb.healing, before)
    learned = data.tokens(fitted + gated) - data.tokens(fitted)
    how = "the size that the budget buys" if verb.budget else "the first size; each smaller one takes a third as much, until one fails on tune"
    how += "; none where the cut costs next to nothing" if verb.start and verb.heal_tokens is None else ""
    return [
        Stage("fit", f"taken over from {verb.start}" if verb.start else _fitted(verb), fitted, data.tokens(fitted)),
        Stage("gates", f"taken over from {verb.start}" if verb.start else "which nodes matter", gated, learned),
        Stage("heal", how, first, data.tokens(before + first) - data.tokens(before)),
        Stage("compile", "a stock checkpoint, reloaded in a fresh process", None, None),
        Stage("evaluate", f"{verb.prompts} held-out prompts of each task, for the model, the checkpoint and a twin if there is one", None, None)]


def _fitted(verb: config.Prune) -> str:
    """What the first stage does."""
    if verb.dictionaries is None:
        return "every site from noise, then all together"
    return f"transcoders from {verb.dictionaries} (not counted below)" + (", fitted further" if verb.fitting else "")


def trained(host: Host, verb: config.Prune) -> int:
    """Parameters that the fit trains: of transcoders and of refitted attention; with the model's own neurons, of attention alone."""
    settings, count = fit_settings(verb), 0
    for site in host.sites:
        if site.kind == "attention":
            count += sum(p.numel() for p in host.module(site.module).parameters()) if verb.attention == "refit" else 0
        elif verb.basis == "features":
            count += (settings.features + settings.skip) * (site.d_in + site.d_out) + settings.features + site.d_out
    return count


def _stand_ins(host: Host, verb: config.Prune) -> int:
    """Parameters of all parts that stand in for the model's, healed together: what is trained, and what is the model's own."""
    own = {"mlp"} if verb.basis != "features" else set()
    own |= {"attention"} if verb.attention == "kept" else set()
    return trained(host, verb) + sum(p.numel() for site in host.sites if site.kind in own for p in host.module(site.module).parameters())


def memory(host: Host, data: Epochs, verb: config.Prune) -> int:
    """Bytes that training holds at once, what this process holds already (the libraries) among them."""
    lengths, width, vocabulary = [len(row.ids) for row in data.rows], host.config.hidden_size, host.config.vocab_size
    targets = 2 * sum(lengths) * vocabulary
    hidden = verb.features if verb.basis == "features" else getattr(host.config, "intermediate_size", 4 * width)
    batch = max(lengths) * data.size * (4 * vocabulary + host.config.num_hidden_layers * (KEPT * width + 3 * hidden)) * FLOAT
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return libraries + held(host.model).bytes + _stand_ins(host, verb) * TRAINED * FLOAT + (targets if targets <= BUDGET else 0) + batch


def disk(host: Host, verb: config.Prune) -> int:
    """Bytes in the run folder at most: graph, gated and healed parts, the training state, and a checkpoint with all of the first."""
    parts = _stand_ins(host, verb) * FLOAT
    return (3 + 3) * parts + parts + held(host.model).embeddings * FLOAT


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
