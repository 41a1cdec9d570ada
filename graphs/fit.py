"""Fit: a dictionary for every site from clean rows, first each alone, then all together.

Every transcoder and every attention layer starts from noise, so nothing that clean rows do not exercise can be inherited
from block weights. What a transcoder writes starts at the best that its random features allow, by ridge regression on one clean batch
(random features: Rahimi and Recht 2008, "Weighted sums of random kitchen sinks"). Transcoders may start from published ones instead
(`graphs.published`), and then inherit what their makers put in. Two steps, both on clean rows only:

1. *local*: each part learns the host's own input-output pairs at its site, and attention also what each head writes before
   the output projection; the loss is the sum over sites of FVU (squared error over variance) plus a sparsity penalty on
   transcoders, mean_f tanh(a_f |d_f|) (Anthropic 2024, "Circuits updates, January: tanh penalty"), where |d_f| is the
   decoder's norm in units of the output's spread.
2. *end to end*: all parts are swapped in at once, with no error nodes, and KL to the host is minimised over all of them
   (cf. Braun et al. 2024, "Identifying functionally important features with end-to-end sparse dictionary learning"). The
   local loss stays on as an `anchor`: without it the parts drift from what they stand for (LOG.md).

BOS positions are fitted like all others. Features that stop firing are born again where the error is largest. The
activations stream: nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graphs.activations import Recording, record
from graphs.architectures import Site
from graphs.attention import GroupGate
from graphs.batches import Batch
from graphs.fused import fused
from graphs.host import Host
from graphs.losses import SURE, divergence, fvu, taught, variance
from graphs.neurons import Neurons
from graphs.replace import Replacement, from_noise
from graphs.shares import gathered, same, share, weighed
from graphs.targets import Targets
from graphs.train import TrainConfig, train
from graphs.transcoder import Transcoder

Batches = Callable[[int], Batch]
NARROW = 144
"""Width at which the learning rates were chosen."""
RIDGE = 0.1
"""Of the decoder's start, as a share of a token's mean squared activation (LOG.md)."""
SAMPLE, BLOCK = 2048, 8192
"""Tokens that a decoder starts from at most, and features that are looked at together."""


@dataclass(frozen=True)
class FitConfig:
    """features: a layer; sparsity: weight of the penalty; prompt_weight: weight in KL of positions that predict prompt
    tokens (1 for those of the completion); anchor: weight of the local loss beside KL; attention: "refit" from noise or "kept"
    (ablation); skip: rank of each transcoder's linear skip; basis: "features" (transcoders) or "neurons", the model's own, which
    stay as they are: then attention alone is fitted; "layers": the same, with whole layers as nodes in their place; local_rate: of models up
    to `NARROW` wide (`local_rate`)."""

    features: int = 512
    local_steps: int = 400
    joint_steps: int = 100
    local_rate: float = 4e-3
    joint_rate: float = 1.5e-3
    sparsity: float = 2e-3
    prompt_weight: float = 0.1
    anchor: float = 0.05
    skip: int = 0
    attention: str = "refit"
    basis: str = "features"
    seed: int = 0


def local_rate(config: FitConfig, width: int) -> float:
    """The local step's learning rate in a model of that width: it falls as 1 / width (Yang et al. 2022, "Tensor programs V", table 3, for Adam's
    hidden weights); without that, features of wide models die (LOG.md)."""
    return config.local_rate * min(1.0, NARROW / width)


def fit(
    targets: Targets, config: FitConfig, state: Path | None = None, given: Mapping[str, Transcoder] | None = None
) -> tuple[Replacement, dict[str, list[float]]]:
    """The replacement of `targets.host` fitted on `targets.batches`, and the losses of both steps. given: transcoders to start from instead of
    noise (`graphs.published`)."""
    host, batches = targets.host, targets.batches
    replacement = from_noise(host, config.features, config.seed, config.attention, config.skip, config.basis, given)
    spread = _start(host, replacement, batches, random=not given)

    def local(batch: Batch) -> Tensor:
        return local_loss(host, replacement, batch, config, spread)

    fitted = any(p.requires_grad for site in host.sites for p in replacement.part(site).parameters())  # else all are the host's own
    with watching(replacement):
        losses = {"fit: local": _local(host, replacement, batches, config, local, state and state.with_suffix(".local")) if fitted else []}
        losses["fit: end to end"] = distill(
            targets, replacement, config.joint_steps, config.joint_rate, config.prompt_weight, "fit: end to end",
            state and state.with_suffix(".joint"), first=config.local_steps,
            beside=(lambda batch: config.anchor * local(batch)) if config.anchor and fitted else None)
    set_means(replacement, batches)
    return replacement, losses


@torch.no_grad()
def _start(host: Host, replacement: Replacement, batches: Batches, random: bool) -> dict[str, float]:
    """Let each transcoder write the most that it can from its features, where these are random; returns the outputs' spreads."""
    batch, spread = batches(0), {}
    found = record(host, batch.ids)
    for site in host.sites:
        part, y = replacement.part(site), found.outputs[site.name][batch.real]
        spread[site.name] = spread_of(y)
        if random and isinstance(part, Transcoder) and not isinstance(part, Neurons):
            start(part, found.inputs[site.name][batch.real], y)
    return spread


@torch.no_grad()
def start(part: Transcoder, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]) -> None:
    """Put the output bias at the mean output, and the decoder where ridge regression on the activations puts it. In its dual form, a system of
    tokens, and block by block: there may be many more features."""
    x, y, blocks = x[:SAMPLE], y[:SAMPLE], range(0, part.features, BLOCK)
    part.b_dec.copy_(y.mean(0))

    def active(first: int) -> Float[Tensor, "token block"]:
        return torch.relu(nn.functional.linear(x, part.w_enc[first : first + BLOCK], part.b_enc[first : first + BLOCK]))

    with torch.autocast(x.device.type, enabled=False):
        gram = sum((one @ one.T for one in map(active, blocks)), x.new_zeros(len(x), len(x)))
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
        by_token = torch.linalg.solve(gram, y - part.b_dec)
        for first in blocks:
            part.w_dec[first : first + BLOCK] = active(first).T @ by_token


def spread_of(y: Float[Tensor, "token d_out"]) -> float:
    """Root mean variance of outputs."""
    return float((y - y.mean(0)).square().sum(-1).mean().sqrt())


def run_part(replacement: Replacement, site, found: Recording) -> Float[Tensor, "row token d_out"]:
    """The part at `site` on the host's own input."""
    part, x = replacement.part(site), found.inputs[replacement.origin(site)]
    return part(x) if site.kind == "mlp" else part(x, position_embeddings=found.rotary, attention_mask=None)[0]


def transcoder_loss(
    part: Transcoder, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], config: FitConfig, spread: float
) -> Float[Tensor, ""]:
    """FVU of one transcoder, and its sparsity penalty. spread: of its outputs."""
    target, scale = y if part.skip_in is None else y - part.through(x), config.features**0.5 / 4 / max(spread, 1e-8)
    weight = config.sparsity * weighed(x.new_tensor(1 / len(x)), len(x))
    return fused(x, target, part.w_enc, part.b_enc, part.w_dec, part.b_dec, scale, variance(y), weight)


def local_loss(host: Host, replacement: Replacement, batch: Batch, config: FitConfig, spread: dict[str, float]) -> Float[Tensor, ""]:
    """FVU of every site on the host's own inputs, and the sparsity penalty. To be called while the replacement is watched."""
    found, total = record(host, batch.ids), torch.zeros(())
    for site in replacement.sites:
        total = total + site_loss(replacement, site, found, batch, config, spread[site.name])
    return total


def site_loss(
    replacement: Replacement, site: Site, found: Recording, batch: Batch, config: FitConfig, spread: float
) -> Float[Tensor, ""] | float:
    """`local_loss` of one site, from what the host was seen to do there; spread: of its outputs."""
    part = replacement.part(site)
    if isinstance(part, Neurons):
        return 0.0
    if isinstance(part, Transcoder):
        return transcoder_loss(part, found.inputs[site.name][batch.real], found.outputs[site.name][batch.real], config, spread)
    loss = fvu(found.outputs[site.name], run_part(replacement, site, found), batch.real)
    if config.attention != "refit":
        return loss
    return loss + fvu(found.heads[site.name], replacement.group_gates[site.name].last, batch.real)  # type: ignore[arg-type]


def _local(
    host: Host, replacement: Replacement, batches: Batches, config: FitConfig, local: Callable[[Batch], Tensor], state: Path | None
) -> list[float]:
    rebirths = {int(config.local_steps * share) for share in (0.2, 0.4, 0.6)}

    def after(step: int) -> None:
        if step in rebirths:
            with gathered(replacement):
                rebirth(host, replacement, [batches(step + ahead) for ahead in range(4)])
                same(replacement)

    settings = TrainConfig(config.local_steps, local_rate(config, host.config.hidden_size))
    return train(replacement, lambda step: local(share(batches(step))), settings, "fit: local", state, after=after)


@torch.no_grad()
def rebirth(host: Host, replacement: Replacement, sample: Sequence[Batch]) -> dict[str, int]:
    """Features that fire nowhere in `sample` read an input that is badly explained and write its error; how many, by site.

    Together they write at most what takes most off the error there: where many are born at once, or inputs are long, each adds to what the
    others write, and a tenth of the error for each would be many times the whole.
    """
    found = [record(host, batch.ids) for batch in sample]
    reborn = {}
    for site in replacement.sites:
        part = replacement.part(site)
        if not isinstance(part, Transcoder) or isinstance(part, Neurons):
            continue
        x = torch.cat([one.inputs[site.name][batch.real] for one, batch in zip(found, sample, strict=True)])
        y = torch.cat([one.outputs[site.name][batch.real] for one, batch in zip(found, sample, strict=True)])
        dead = (~(part.encode(x) > 0).any(0)).nonzero().flatten()
        error = y - part(x)
        worst = error.square().sum(-1).topk(min(len(dead), len(error))).indices
        dead = dead[: len(worst)]
        part.w_enc[dead] = x[worst] / x[worst].norm(dim=1, keepdim=True) * part.w_enc.norm(dim=1).mean()
        part.b_enc[dead] = 0.0
        part.w_dec[dead] = error[worst] * 0.1
        written = part.encode(x)[:, dead] @ part.w_dec[dead]
        part.w_dec[dead] *= ((written * error).sum() / written.square().sum().clamp_min(1e-12)).clamp(0, 1)
        reborn[site.name] = len(dead)
    return reborn


@contextmanager
def watching(replacement: Replacement) -> Iterator[None]:
    """Transcoders remember their last activations, attention layers what their heads wrote, inside the block."""
    watched: list[Transcoder | GroupGate] = [*replacement.transcoders().values(), *replacement.group_gates.values()]
    for part in watched:
        part.watch = True
    try:
        yield
    finally:
        for part in watched:
            part.watch, part.last = False, None


def distill(
    targets: Targets, replacement: nn.Module, steps: int, learning_rate: float, prompt_weight: float, label: str,
    state: Path | None = None, first: int = 0, decay: float = 0.0, beside: Callable[[Batch], Tensor] | None = None,
    sure: float = SURE, answers: float = 0.0,
) -> list[float]:
    """Minimise KL to the host over everything in `replacement` (token ids to logits) that may be trained; returns the loss of every step.

    first: offset of the batches; decay: weight decay of the matrices; beside: added to it; sure: as in `divergence`; answers: weight of the rows'
    own completions, as in `taught`.
    """
    def loss(step: int) -> Tensor:
        batch = share(targets.batches(first + step))
        value = taught(replacement(batch.ids), targets(batch), batch, prompt_weight, sure, answers)
        return value if beside is None else value + beside(batch)

    return train(replacement, loss, TrainConfig(steps, learning_rate, warmup=0.05, weight_decay=decay), label, state) if steps else []


@torch.no_grad()
def set_means(replacement: Replacement, batches: Batches, count: int = 4) -> None:
    """Measure each feature's mean activation on clean tokens, with all parts swapped in."""
    totals, tokens = {name: torch.zeros_like(part.mean) for name, part in replacement.transcoders().items()}, 0
    with watching(replacement):
        for step in range(count):
            batch = batches(step)
            replacement(batch.ids)
            tokens += int(batch.real.sum())
            for name, part in replacement.transcoders().items():
                totals[name] += part.last.view(*batch.real.shape, -1)[batch.real].sum(0)  # type: ignore[union-attr]  # OPT flattens rows
    for name, part in replacement.transcoders().items():
        part.mean.copy_(totals[name] / tokens if part.folds else torch.zeros_like(part.mean))


@torch.no_grad()
def quality(host: Host, replacement: Replacement, batches: Batches, count: int = 2) -> dict:
    """FVU, L0 and dead features by site; cross entropy of host and replacement and KL between them, nats a token. A part whose layer
    was numbered anew is held against the host's own layer that it stands for."""
    sums: dict[str, list[float]] = {site.name: [] for site in replacement.sites}
    active = {name: torch.zeros(part.features) for name, part in replacement.transcoders().items()}
    tokens, kl, entropy = 0, [], {"host": [], "swapped": []}  # type: ignore[var-annotated]
    with watching(replacement):
        for step in range(count):
            batch = batches(step)
            found = record(host, batch.ids, logits=True)
            for site in replacement.sites:
                sums[site.name].append(float(fvu(found.outputs[replacement.origin(site)], run_part(replacement, site, found), batch.real)))
                if site.name in active:
                    active[site.name] += (replacement.part(site).last[batch.real] != 0).sum(0)  # type: ignore[index]
            tokens += int(batch.real.sum())
            logits = replacement(batch.ids)
            kl.append(float(divergence(logits, found.logits, batch, 0.0)))  # type: ignore[arg-type]
            for name, values in (("host", found.logits), ("swapped", logits)):
                entropy[name].append(float(torch.nn.functional.cross_entropy(values[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())))  # type: ignore[index]
    rows = []
    for site in replacement.sites:
        counts = active.get(site.name)
        nodes = replacement.node_counts()[site.name] if counts is None else len(counts)
        rows.append({"name": site.name, "fvu": sum(sums[site.name]) / count, "features": nodes,
                     "l0": None if counts is None else float(counts.sum() / tokens), "dead": None if counts is None else int((counts == 0).sum())})
    return {"sites": rows, "kl_swapped": sum(kl) / count, "ce_model": sum(entropy["host"]) / count, "ce_swapped": sum(entropy["swapped"]) / count}
