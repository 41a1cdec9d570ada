"""Scores: what a node is worth to the task's next tokens, before any gate is learned.

    magnitude    norm of what a node reads times the norm of what it writes: no data
    frequency    share of tokens on which a feature is active
    activation   mean |activation| times the norm of the write vector
    fisher       mean square of d loss / d gate: a diagonal Fisher estimate of what closing the node costs (Michel et al. 2019,
                 "Are sixteen heads really better than one?"; Molchanov et al. 2019)
    attribution  |d loss / d gate| at 1: attribution patching towards the node's mean (Nanda 2023; Syed et al. 2023)
    integrated   the same, averaged over all gates half shut at once by five degrees (integrated gradients, Sundararajan et al. 2017;
                 with all nodes on one path, as EAP-IG does: Hanna et al. 2024)
    relp         attribution with norms' scales and attention patterns held and each factor of a gated neuron given half (Achtibat et
                 al. 2024, "AttnLRP"; Jafari et al. 2025, "RelP"); a ReLU's ratio rule is its gradient
    random       a control

Attention's nodes are KV groups or their components; always active, they have no frequency and get their activation score. Where whole
layers are nodes, one gate scales all that a layer writes, and gradients are with respect to it; magnitude and activation are summed over
the neurons and heads of the layer, and frequency is activation. Gradients are taken a batch of clean rows at a time; the absolute value,
or square, is taken of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graphs.activations import hooks
from graphs.architectures import architecture, norm
from graphs.attention import groups, projection, width
from graphs.batches import Batch
from graphs.fit import Batches, watching
from graphs.neurons import Neurons
from graphs.replace import LAYERS, Replacement

DEGREES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Gate values that integrated gradients are averaged over (midpoints of five steps)."""
Values = dict[str, Float[Tensor, "_node"]]


def gradients(replacement: Replacement, batch: Batch, components: bool, degree: float = 1.0) -> Values:
    """d loss / d gate with every gate at `degree`; the loss is the next-token loss on completions."""
    gates = {name: torch.full((count,), degree, requires_grad=True) for name, count in replacement.node_counts(components).items()}
    with torch.enable_grad(), replacement.gated(gates):
        labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
        loss = nn.functional.cross_entropy(replacement(batch.ids)[:, :-1].flatten(0, 1), labels.flatten())
        return dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))


def averaged(one: Callable[[Batch], Mapping[str, Tensor]], batches: Batches, count: int) -> Values:
    """The mean of `one` over batches."""
    total: Values = {}
    for step in range(count):
        for name, value in one(batches(step)).items():
            total[name] = total.get(name, torch.zeros(())) + value / count
    return total


def fisher(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """Mean squared gradients."""
    return averaged(lambda batch: {name: g.square() for name, g in gradients(replacement, batch, components).items()}, batches, count)


def attribution(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """Mean absolute gradients."""
    return averaged(lambda batch: {name: g.abs() for name, g in gradients(replacement, batch, components).items()}, batches, count)


def integrated(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """Mean absolute gradients along the way from all gates shut to all open."""
    def one(batch: Batch) -> Values:
        along = [gradients(replacement, batch, components, degree) for degree in DEGREES]
        return {name: torch.stack([g[name] for g in along]).mean(0).abs() for name in along[0]}
    return averaged(one, batches, count)


def relp(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """Attribution through the linearised model."""
    with linearised(replacement):
        return attribution(replacement, batches, count, components, seed)


def random(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """Uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(nodes, generator=generator) for name, nodes in replacement.node_counts(components).items()}


def activation(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int, often: bool = False) -> Values:
    """Mean size of what each node writes; often: of features, the share of tokens on which they are active instead."""
    @torch.no_grad()
    def one(batch: Batch) -> Values:
        found: Values = {}
        replacement(batch.ids)
        for name, part in replacement.transcoders().items():
            assert part.last is not None
            active = part.last.reshape(*batch.real.shape, -1)[batch.real]
            found[name] = (active != 0).float().mean(0) if often else active.abs().mean(0) * part.w_dec.norm(dim=1)
        for name, layer in replacement.attention().items():
            wrote = replacement.group_gates[name].last
            assert wrote is not None
            size = wrote[batch.real].abs().mean(0) * projection(layer, "o_proj").weight.norm(dim=0)
            by_node = size.view(groups(layer), -1, width(layer)).sum(1)
            found[name] = by_node.flatten() if components else by_node.sum(1)
        return found

    with watching(replacement):
        return by_layer(replacement, averaged(one, batches, count))


def by_layer(replacement: Replacement, found: Values) -> Values:
    """The values of what a coarse replacement prunes: in the place of each MLP's, a layer's own, the sum over its neurons and heads."""
    if replacement.layers is None:
        return found
    layers = torch.zeros(len(replacement.layers))
    for site in replacement.sites:
        layers[site.layer] += found[site.name].sum()
    return {name: found[name] for name in replacement.attention()} | {LAYERS: layers}


@torch.no_grad()
def magnitude(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """Weights alone."""
    found: Values = {}
    for name, part in replacement.transcoders().items():
        read = part.w_enc.norm(dim=1)
        if isinstance(part, Neurons) and part.w_gate is not None:
            read = read * part.w_gate.norm(dim=1)
        found[name] = read * part.w_dec.norm(dim=1)
    for name, layer in replacement.attention().items():
        write = projection(layer, "o_proj").weight.norm(dim=0).view(groups(layer), -1, width(layer)).sum(1)
        by_node = projection(layer, "v_proj").weight.norm(dim=1).view(groups(layer), width(layer)) * write
        found[name] = by_node.flatten() if components else by_node.sum(1)
    return by_layer(replacement, found)


def frequency(replacement: Replacement, batches: Batches, count: int, components: bool, seed: int) -> Values:
    """How often features are active."""
    return activation(replacement, batches, count, components, seed, often=replacement.layers is None)


SCORES: dict[str, Callable[[Replacement, Batches, int, bool, int], Values]] = {
    "fisher": fisher, "attribution": attribution, "integrated": integrated, "relp": relp, "frequency": frequency, "activation": activation,
    "magnitude": magnitude, "random": random}


@contextmanager
def linearised(replacement: Replacement) -> Iterator[None]:
    """Inside the block, gradients pass norms as if their scales were constants, attention as if its patterns were, and each factor
    of a gated neuron by half; outputs stay what they are."""
    model = replacement.model
    paths = {site.norm for site in replacement.sites} | {architecture(model).final_norm}

    def hold(path: str):
        through = norm(model, path)

        def hook(_module, args, kwargs, output):
            stream = args[0] if args else kwargs["hidden_states"]
            return through.frozen(stream, through.inverse(stream.detach()))
        return hook

    parts: list[nn.Module] = [*replacement.attention().values(), *(part for part in replacement.transcoders().values() if isinstance(part, Neurons))]
    try:
        with hooks() as handles:
            handles += [model.get_submodule(path).register_forward_hook(hold(path), with_kwargs=True) for path in sorted(paths)]
            for part in parts:
                part.linear = True  # type: ignore[assignment]
            yield
    finally:
        for part in parts:
            part.linear = False  # type: ignore[assignment]
