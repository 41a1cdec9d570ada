"""What every stage of a run needs, and the settings that the verb's flags stand for."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill import config
from distill.budget import bought
from distill.compile import home
from distill.rows import batches
from evals.size import parameters
from evals.tasks import Task
from graphs.artifact import read_json
from graphs.batches import Encoded, Epochs
from graphs.fit import FitConfig
from graphs.host import Host, load
from graphs.prune import PruneConfig
from graphs.replace import from_noise
from graphs.targets import Targets
from graphs.tokens import merge_others, seen_in


@dataclass(frozen=True)
class Job:
    """What every stage needs: the host, the clean rows' batches, and where to write."""

    host: Host
    texts: Sequence[tuple[str, str]]
    data: Epochs
    targets: Targets
    rows: list[Encoded]
    tasks: Sequence[Task]
    folder: Path
    verb: config.Fit
    drawn: float
    """Share of nodes that gates are drawn to."""
    tokens: list[int] | None
    """The token nodes that the circuit keeps, if not all: those of the rows that were given, not of those that the model wrote."""

    @property
    def work(self) -> Path:
        """Where states and intermediate stages live."""
        return self.folder / ".work"


def prepare(model: Path, texts: Sequence[tuple[str, str]], tasks: Sequence[Task], verb: config.Fit, clean: int | None = None) -> Job:
    """Load the model and tokenise the rows. clean: how many of them, the first, were given (all, unless told otherwise). Raises ValueError where
    no class could hold the circuit, or none is as small as asked."""
    host = load(model)
    home(host.model, verb.target if isinstance(verb, config.Prune) else "auto", verb.basis != "features", verb.attention == "kept")
    share = drawn(host, verb) if isinstance(verb, config.Prune) else PruneConfig.target
    data, rows = batches(host, texts, verb.batch, verb.seed)
    tokens = seen_in(rows[:clean], host) if isinstance(verb, config.Prune) and verb.tokens == "seen" else None
    followed = host if tokens is None else without(host, tokens)
    return Job(host, texts, data, Targets(followed, data), rows, tasks, verb.out, verb, share, tokens)


def without(host: Host, kept: Sequence[int]) -> Host:
    """A copy of the model to which all tokens but the kept ones are one: what is trained towards where a circuit keeps no others."""
    made = Host(copy.deepcopy(host.model), host.tokenizer, host.sites)
    merge_others(made, kept)
    return made


def drawn(host: Host, verb: config.Prune) -> float:
    """Share of nodes that gates are drawn to: what the budget buys, for which nodes are best depends on how many are kept (LOG.md); as in the
    run to start from. Raises ValueError where the budget buys nothing."""
    share = PruneConfig.target
    if verb.budget is not None:
        settings = fit_settings(verb)
        graph = from_noise(host, settings.features, settings.seed, settings.attention, settings.skip, settings.basis)
        size = bought(graph, verb, parameters(host.model).stored)
        share = size.share if size.layers is None else math.sqrt(size.share)  # layers and heads fall side by side
    return share if verb.start is None else read_json(verb.start / ".work" / "gated" / "receipt.json")["settings"]["target"]


def fit_settings(verb: config.Fit) -> FitConfig:
    """The fit's settings from the flags."""
    if verb.basis != "features":  # features and their sparsity are of transcoders
        return FitConfig(features=0, local_steps=verb.fit_steps, joint_steps=verb.joint_steps, sparsity=0.0, attention=verb.attention,
                         basis=verb.basis, seed=verb.seed)
    return FitConfig(features=verb.features, local_steps=verb.fit_steps, joint_steps=verb.joint_steps, sparsity=verb.sparsity,
                     attention=verb.attention, skip=verb.skip, basis=verb.basis, seed=verb.seed)


def gate_settings(job: Job, verb: config.Prune) -> PruneConfig:
    """The gates' settings from the flags."""
    return PruneConfig(score=verb.score, steps=verb.gate_steps, target=job.drawn, seed=verb.seed, components=verb.attention_nodes == "components")
