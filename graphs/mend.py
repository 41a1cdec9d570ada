"""Mend: fit one part further, where its error is felt most.

The hole of a site is KL(host || host with this part alone in its layer's place), nats a completion token: what ablating the site's error
costs while all other errors stay on (`graphs.hypotheses.holes` ranks the same of a finished graph). The part with the largest hole is
fitted further on clean rows, and all else stays as it is. What is minimised is its own hole, KL with all parts swapped in, and beside them
(`anchor`) the loss of the local fit. A hole alone would be mended at the cost of the whole, whose other parts have grown around it (LOG.md).

A transcoder could buy a smaller error with more active features. It may not: the weight of its sparsity penalty answers to how many are
active, sparsity * exp(HOLD (L0 / L0 before + SPARE - 1)), a function of the weights alone, so that a killed run goes on as it would have.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphs.activations import record
from graphs.architectures import Site, install
from graphs.fit import FitConfig, set_means, site_loss, spread_of, watching
from graphs.host import Host
from graphs.losses import divergence
from graphs.processes import agreed
from graphs.replace import Replacement
from graphs.shares import averaged, share
from graphs.targets import Targets
from graphs.train import TrainConfig, train
from graphs.transcoder import Transcoder

SAMPLE = 4
"""Batches that holes and L0 are measured on."""
HOLD, SPARE = 40.0, 0.04
"""How fast the penalty answers to L0 (one percent more active features make it 1.5 times as heavy), and how far below the old one it settles."""


def mend(
    targets: Targets, replacement: Replacement, steps: int, config: FitConfig, first: int, state: Path | None = None
) -> dict[str, list[float]]:
    """Fit the part with the largest hole for `steps` batches, from the `first` on; returns the losses under the name of the site.
    Some part must not be the host's own."""
    found = holes(targets, replacement)  # by all processes: targets that nobody has made yet are made together
    site = replacement.host().site(agreed(lambda: max(found, key=found.__getitem__)))
    part, host = replacement.part(site), targets.host
    begin = targets.batches(0)
    model, spread = alone(host, replacement, site), spread_of(record(host, begin.ids).outputs[site.name][begin.real])
    with watching(replacement), only(part, replacement):
        before = usual(targets, model, part) if isinstance(part, Transcoder) else None

        def loss(step: int) -> Tensor:
            batch = share(targets.batches(first + step))
            target = targets(batch)
            hole = divergence(model(input_ids=batch.ids).logits, target, batch, config.prompt_weight)
            heavy = 1.0 if before is None else math.exp(HOLD * (float(averaged(active(part, batch.real))) / before + SPARE - 1))
            own = site_loss(replacement, site, record(host, batch.ids), batch, replace(config, sparsity=config.sparsity * heavy), spread)
            return hole + divergence(replacement(batch.ids), target, batch, config.prompt_weight) + config.anchor * own

        losses = train(part, loss, TrainConfig(steps, config.joint_rate), f"mend {site.name}", state)
    set_means(replacement, targets.batches)
    return {f"mend {site.name}": losses}


def alone(host: Host, replacement: Replacement, site: Site) -> PreTrainedModel:
    """The host with the part at `site` in its layer's place. Both are the very parts, not copies."""
    model = copy.deepcopy(host.model, {id(tensor): tensor for tensor in (*host.model.parameters(), *host.model.buffers())})
    install(model, site, replacement.part(site))
    return model


@torch.no_grad()
def holes(targets: Targets, replacement: Replacement, count: int = SAMPLE) -> dict[str, float]:
    """The hole of every site whose part is not the host's own, on the first `count` batches."""
    found = {}
    for site in replacement.sites:
        if not any(p.requires_grad for p in replacement.part(site).parameters()):
            continue
        model = alone(targets.host, replacement, site)
        kl = [float(divergence(model(input_ids=batch.ids).logits, targets(batch), batch, 0.0)) for batch in map(targets.batches, range(count))]
        found[site.name] = sum(kl) / count
    return found


def active(part: nn.Module, real: Bool[Tensor, "row token"]) -> Float[Tensor, ""]:
    """Features active a token, when a watched transcoder last ran."""
    return (part.last.view(*real.shape, -1)[real] != 0).float().sum(-1).mean()  # type: ignore[union-attr,operator]


@torch.no_grad()
def usual(targets: Targets, model: PreTrainedModel, part: nn.Module, count: int = SAMPLE) -> float:
    """L0 of a watched transcoder in `model`, over the first `count` batches."""
    total = 0.0
    for batch in map(targets.batches, range(count)):
        model(input_ids=batch.ids)
        total += float(active(part, batch.real))
    return total / count


@contextmanager
def only(part: nn.Module, replacement: Replacement) -> Iterator[None]:
    """Nothing but `part` is trained inside the block."""
    mine = {id(p) for p in part.parameters()}
    others = [p for p in replacement.parameters() if p.requires_grad and id(p) not in mine]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
