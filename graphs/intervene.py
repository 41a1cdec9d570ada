"""Interventions: run a model with chosen nodes held at chosen values, and everything after them free to answer.

A node's value is read from what its site reads in this very run, so an earlier intervention is seen by later nodes; the site
then writes what it would, plus (value - activation) times the node's write vector, at every token. Errors stay as they are.
Nothing is frozen: this is what a claim about behaviour must survive, while `graphs.trace.Frozen` proves single edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.architectures import Site
from graphs.components import Components
from graphs.edges import Reconstruction, reads, writes
from graphs.trace import eager, first, hooks


@dataclass(frozen=True)
class Held:
    """Nodes of one site, and the value each is held at."""

    nodes: Int[Tensor, "node"]
    values: Float[Tensor, "node"]


def run(subject: Reconstruction, ids: Int[Tensor, "row token"], held: Mapping[str, Held]) -> Float[Tensor, "row token vocabulary"]:
    """Logits with nodes held, by site name. Differentiable."""
    host, inputs = subject.host, {}
    configs = [host.model.config, *(part.config for part in subject.stand_ins.values())]

    def reading(names: list[str]):
        def hook(_module, _args, output):
            inputs.update({name: output for name in names})
        return hook

    def routing(site: Site):
        def hook(_module, args, kwargs, output):
            pattern = output[1]
            if site.name in subject.stand_ins:
                inside = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "layer_past", "use_cache")}
                pattern = subject.stand_ins[site.name](*args, **inside)[1]
            inputs[f"{site.name} pattern"] = pattern
        return hook

    def writing(site: Site, change: Held):
        def hook(_module, args, output):
            y, x = first(output), inputs[site.name]
            moved = y + shift(subject, site, change, x.reshape(*ids.shape, -1), inputs.get(f"{site.name} pattern")).reshape(y.shape)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved
        return hook

    with eager(configs), hooks() as handles:
        by_norm: dict[str, list[str]] = {}
        for site in host.sites:
            by_norm.setdefault(site.norm, []).append(site.name)
            if site.name in held:
                if site.kind == "attention":
                    handles.append(host.module(site.module).register_forward_hook(routing(site), with_kwargs=True))
                handles.append(host.module(site.writes).register_forward_hook(writing(site, held[site.name])))
        for path, names in by_norm.items():
            handles.append(host.module(path).register_forward_hook(reading(names)))
        return host.model(input_ids=ids, use_cache=False).logits


def shift(subject: Reconstruction, site: Site, change: Held, x: Tensor, pattern: Tensor | None) -> Float[Tensor, "row token d"]:
    """What holding the nodes adds to what the site writes."""
    part = subject.basis[site.name]
    if isinstance(part, Components):
        assert pattern is not None
        heads = change.nodes // part.write.shape[1]
        values = torch.einsum("rtd,nd->rnt", x, reads(part)[change.nodes]) + part.biases[change.nodes][:, None]
        a = torch.einsum("rnts,rns->rtn", pattern[:, heads], values)
    else:
        a = part.activations(x)[..., change.nodes]
    return (change.values - a) @ writes(part)[change.nodes]


def gradients(
    subject: Reconstruction, ids: Int[Tensor, "row token"], metric
) -> tuple[Float[Tensor, "row"], dict[str, Float[Tensor, "row token d"]]]:
    """metric(logits) of each row, and its gradient with respect to what each site writes."""
    taken: dict[str, Tensor] = {}

    def hook(name: str):
        def take(_module, _args, output):
            y = first(output)
            leaf = y if y.requires_grad else y.detach().requires_grad_(True)
            taken[name] = leaf
            if leaf.requires_grad and not leaf.is_leaf:
                leaf.retain_grad()
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf
        return take

    with torch.enable_grad(), hooks() as handles:
        for site in subject.host.sites:
            handles.append(subject.host.module(site.writes).register_forward_hook(hook(site.name)))
        value = metric(subject.host.model(input_ids=ids, use_cache=False).logits)
        found = torch.autograd.grad(value.sum(), list(taken.values()))
    shape = (*ids.shape, -1)
    return value.detach(), {name: gradient.reshape(shape) for name, gradient in zip(taken, found, strict=True)}
