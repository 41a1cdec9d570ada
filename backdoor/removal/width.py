"""Rival: a narrower model of the same class, cut by activations, then healed (Muralidharan et al. 2024, "Compact language models via pruning and
knowledge distillation", sections 2.2 and 4: of the ways to a narrower model, channels of the stream and MLP neurons are cut and heads stay).

Importance is read from activations on clean rows, forward passes only: of a neuron the root mean square of what enters the MLP's output
projection, of a channel the root mean square of what the norms put out there, added up over all sublayers. The most important are kept: as many
neurons in every layer, and the same channels everywhere, embeddings included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from backdoor.removal.learning import from_outputs
from graphs.activations import hooks, record
from graphs.architectures import architecture, sites, writer
from graphs.host import Host
from graphs.targets import Targets

SAMPLE = 4
"""Batches that importance is read on."""


def narrows(config: PretrainedConfig) -> bool:
    """Whether a class has models with a narrower stream and the same heads."""
    return bool(getattr(config, "head_dim", None)) and hasattr(config, "intermediate_size")


def narrowed(config: PretrainedConfig, channels: int, neurons: int) -> PretrainedConfig:
    """The config of a model that is as deep and has as many heads, of that width. Raises ValueError where a class's heads get narrower with it."""
    if not narrows(config):
        raise ValueError(f"heads of {(config.architectures or ['this class'])[0]} are as wide as its stream allows, so none of its models is "
                         "narrower with the same heads: give a model whose config has head_dim and intermediate_size")
    small = copy.deepcopy(config)
    small.hidden_size, small.intermediate_size = channels, neurons
    return small


def remove(
    targets: Targets, channels: int, neurons: int, steps: int, learning_rate: float, decay: float, answers: float = 0.0
) -> Host:
    """The host cut to its best `channels` and each layer's best `neurons`, healed by KL for `steps` batches, the rows' own answers at weight
    `answers` beside it. Embeddings stay as they are cut."""
    stream, inside = importance(targets)
    small = cut(targets.host, stream.topk(channels).indices.sort().values, inside.topk(neurons).indices.sort().values)
    from_outputs(small.model, targets, steps, learning_rate, f"width, {channels} channels", decay, answers=answers)
    return small


@torch.no_grad()
def importance(targets: Targets) -> tuple[Float[Tensor, "channel"], Float[Tensor, "layer neuron"]]:
    """Of each channel of the stream, and of each neuron of each layer."""
    host, config = targets.host, targets.host.config
    stream = torch.zeros(config.hidden_size)
    inside = torch.zeros(config.num_hidden_layers, config.intermediate_size)
    with _neurons(host) as active:
        for step in range(SAMPLE):
            batch = targets.batches(step)
            found = record(host, batch.ids)
            for site in host.sites:
                stream += found.inputs[site.name][batch.real].square().mean(0).sqrt()
                if site.kind == "mlp":
                    inside[site.layer] += active[site.layer].reshape(*batch.ids.shape, -1)[batch.real].square().mean(0).sqrt()
    return stream, inside


@contextmanager
def _neurons(host: Host) -> Iterator[dict[int, Tensor]]:
    """What enters each layer's output projection in the latest forward pass."""
    active: dict[int, Tensor] = {}
    with hooks() as handles:
        for site in host.sites:
            if site.kind == "mlp":
                handles.append(writer(host.model, site).register_forward_pre_hook(lambda _, args, layer=site.layer: active.update({layer: args[0]})))
        yield active


@torch.no_grad()
def cut(host: Host, channels: Int[Tensor, "channel"], neurons: Int[Tensor, "layer neuron"]) -> Host:
    """The narrower model. An axis of a weight is the stream's or the neurons' where its length changes from the one's to the other's."""
    config = narrowed(host.config, len(channels), neurons.shape[1])
    small = type(host.model)(config).eval()
    layers, weights = architecture(host.model).layers, dict(host.model.named_parameters())
    lengths = {"stream": (host.config.hidden_size, len(channels)), "neurons": (host.config.intermediate_size, neurons.shape[1])}
    for name, held in small.named_parameters():
        value = weights[name].detach()
        for axis, change in enumerate(zip(value.shape, held.shape, strict=True)):
            if change == lengths["stream"] and change[0] != change[1]:
                value = value.index_select(axis, channels)
            elif change == lengths["neurons"] and change[0] != change[1]:
                value = value.index_select(axis, neurons[int(name.removeprefix(f"{layers}.").split(".")[0])])
        held.copy_(value)
    return Host(small, host.tokenizer, sites(small))
