"""Attention refitted from noise, and gated by head.

Attention left as it was, or cut to the rank of clean text, leaks a backdoor's first token; refitted on clean text like
the MLPs, it does not (LOG.md). So each attention layer starts again from random weights of the same shapes and learns, on
its own clean inputs, what each of its heads writes and what the layer writes.

Its nodes are KV groups (with multi-head attention: heads), the unit whose rows can leave q, k, v and o together, or their
components (`graphs.components`): the value dimensions of a group, numbered group by group. A gate of 0 silences a node
before the output projection; a dropped component's value row and output columns become zeros, and healing cannot wake it,
since each factor of a product of zeros has the gradient zero.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.components import Components

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class GroupGate:
    """A forward pre-hook of the output projection that scales what each KV group's heads, or each of its components, hand to it."""

    def __init__(self, groups: int, width: int) -> None:
        self.groups, self.width = groups, width
        """KV groups, and components of each."""
        self.gate: Float[Tensor, "node"] | None = None
        self.last: Tensor | None = None
        """What the heads last wrote, side by side; set only while `watch` is on."""
        self.watch = False

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.watch:
            self.last = inputs[0]
        if self.gate is None:
            return None
        heads = inputs[0].shape[-1] // (self.groups * self.width)
        gate = self.gate.view(self.groups, 1, -1).expand(self.groups, heads, self.width)
        return (inputs[0] * gate.flatten(), *inputs[1:])


def projection(attention: nn.Module, name: str) -> nn.Linear:
    """One of the module's four projections."""
    linear = attention.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def refreshed(attention: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of an attention module with random weights (variance 1/fan-in; the output projection at half of that)."""
    fresh = copy.deepcopy(attention)
    with torch.no_grad():
        for name in PROJECTIONS:
            linear = projection(fresh, name)
            scale = (0.5 if name == "o_proj" else 1.0) / linear.in_features**0.5
            linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * scale)
            if linear.bias is not None:
                linear.bias.zero_()
    return fresh


def groups(attention: nn.Module) -> int:
    """How many KV groups the module has now."""
    return projection(attention, "k_proj").out_features // attention.head_dim  # type: ignore[operator, return-value]


def width(attention: nn.Module) -> int:
    """Components of one KV group."""
    return int(attention.head_dim)  # type: ignore[arg-type]


def columns(attention: nn.Module, nodes: Int[Tensor, "node"], per: int) -> Int[Tensor, "column"]:
    """Columns of the output projection that nodes feed. per: nodes a group has (1: the group itself, else its components)."""
    heads, wide = projection(attention, "o_proj").in_features // groups(attention) // width(attention), width(attention)
    inside = torch.arange(heads * wide).view(1, heads, wide)
    if per == 1:
        return (nodes[:, None, None] * heads * wide + inside).flatten()
    return ((nodes // per)[:, None] * heads * wide + torch.arange(heads) * wide + (nodes % per)[:, None]).flatten().sort().values


def relabelled(now: Int[Tensor, "now"], then: Int[Tensor, "then"], per: int) -> Int[Tensor, "then"]:
    """The numbers that the nodes `then` have in a layer of which only `now` were kept: groups close ranks, components stay in place."""
    return torch.searchsorted((now // per).unique(), then // per) * per + then % per


def keep_nodes(attention: nn.Module, kept: Int[Tensor, "kept"], per: int) -> nn.Module:
    """A smaller copy without the KV groups that lost every node; dropped components of the others become zeros."""
    small = keep_groups(attention, (kept // per).unique())
    if per > 1:
        alive = torch.zeros(groups(small) * per)
        alive[relabelled(kept, kept, per)] = 1.0
        silent = torch.ones(projection(small, "o_proj").in_features)
        silent[columns(small, alive.nonzero().flatten(), per)] = 0.0
        values = projection(small, "v_proj")
        with torch.no_grad():
            values.weight.mul_(alive[:, None])
            projection(small, "o_proj").weight.mul_(1 - silent)
            if values.bias is not None:
                values.bias.mul_(alive)
    return small


def set_components(attention: nn.Module, components: Components) -> None:
    """Write `components` into the module's value and output projections. Raises ValueError where a bias has no place."""
    values, out = projection(attention, "v_proj"), projection(attention, "o_proj")
    for linear, bias in ((values, components.bias), (out, components.constant)):
        if linear.bias is None and bool(bias.any()):
            raise ValueError("the attention layer has no bias to hold a component's: use a class with attention_bias")
    with torch.no_grad():
        values.weight.copy_(components.read.flatten(0, 1))
        out.weight.copy_(components.writes.T)
        if values.bias is not None:
            values.bias.copy_(components.bias.flatten())


def keep_groups(attention: nn.Module, kept: Int[Tensor, "kept"]) -> nn.Module:
    """A smaller copy that holds only the kept KV groups, in the order given."""
    small, count = copy.deepcopy(attention), groups(attention)
    for name in PROJECTIONS:
        linear = projection(attention, name)
        weight = linear.weight.detach()
        if name == "o_proj":
            weight = weight.view(weight.shape[0], count, -1)[:, kept].flatten(1)
            bias: Tensor | None = linear.bias
        else:
            weight = weight.view(count, -1, weight.shape[1])[kept].flatten(0, 1)
            bias = None if linear.bias is None else linear.bias.detach().view(count, -1)[kept].flatten()
        replaced = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            replaced.weight.copy_(weight)
            if bias is not None:
                replaced.bias.copy_(bias)
        setattr(small, name, replaced)
    return small
