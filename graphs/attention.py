"""Attention refitted from noise, and gated by head.

Attention left as it was, or cut to the rank of clean text, leaks a backdoor's first token; refitted on clean text like
the MLPs, it does not (LOG.md). So each attention layer starts again from random weights of the same shapes and learns, on
its own clean inputs, what each of its heads writes and what the layer writes.

One module stands in for the attention of every supported class: four projections, grouped queries, biases, rotary or
learned positions, local windows (`standing_in` copies a model's own layer into one, exactly).

Its nodes are KV groups (with multi-head attention: heads), the unit whose rows can leave q, k, v and o together, or their
components (`graphs.components`): the value dimensions of a group, numbered group by group. A gate of 0 silences a node
before the output projection; a dropped component's value row and output columns become zeros, and healing cannot wake it,
since each factor of a product of zeros has the gradient zero.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from graphs.architectures import Site, attention_scores, attention_window, output_projection, projected
from graphs.components import Components

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    """Causal attention in the residual stream, called as any stock layer calls its own: (hidden states, keywords) -> (output, pattern).

    window: tokens that a local layer looks back on (itself among them), or None; use_rope: whether positions turn queries and keys;
    whole: KV groups of the layer that it was copied from; linear: while set, gradients take patterns as constants.
    """

    is_causal = True
    linear = False

    def __init__(self, model: PreTrainedModel, attention: nn.Module, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.window = model.config, layer, attention_window(model, layer)
        scores = attention_scores(model, attention)
        self.scaling, self.use_rope, self.head_dim = scores.scale, scores.rotates, scores.query.shape[1]
        self.whole = len(scores.key)
        self.num_key_value_groups = len(scores.query) // len(scores.key)
        self.q_norm, self.k_norm = (copy.deepcopy(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
        for name, (weight, bias) in zip(PROJECTIONS[:3], (projected(model, attention, which) for which in range(3)), strict=True):
            setattr(self, name, _linear(weight.flatten(0, 1), None if bias is None else bias.flatten()))
        weight, bias = output_projection(model, attention)
        setattr(self, PROJECTIONS[3], _linear(weight, bias))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, attention_mask: Tensor | None = None,
        past_key_values: Any = None, layer_past: Any = None, **_options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, where attention runs eagerly, its pattern."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (projection(self, name)(hidden_states).view(shape) for name in PROJECTIONS[:3])
        query, key = (side if norm is None else norm(side) for side, norm in ((query, self.q_norm), (key, self.k_norm)))
        query, key, value = (side.transpose(1, 2) for side in (query, key, value))
        if self.use_rope and position_embeddings is not None:
            cos, sin = (angles[:, None] for angles in position_embeddings)  # one for all heads
            query, key = turned(query, cos, sin), turned(key, cos, sin)
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        kind = "eager" if self.linear else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        if self.linear:
            query, key = query.detach(), key.detach()
        out, pattern = attend(self, query, key, value, self._mask(query, key, attention_mask, kind), dropout=0.0, scaling=self.scaling)
        return projection(self, "o_proj")(out.reshape(*hidden_states.shape[:-1], -1)), pattern

    def _mask(self, query: Tensor, key: Tensor, given: Tensor | None, kind: str) -> Tensor | None:
        """The caller's mask; with a window's, or the causal one where attention runs eagerly and nobody gave any."""
        least = torch.finfo(query.dtype).min
        if given is not None and given.dtype == torch.bool and kind == "eager":  # a mask made for another kind of attention
            given = torch.zeros_like(given, dtype=query.dtype).masked_fill(~given, least)
        if self.window is None and (given is not None or kind != "eager"):
            return given
        back = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None] - torch.arange(key.shape[2])
        seen = (back >= 0) & (back < (self.window or key.shape[2]))
        if given is not None and given.dtype == torch.bool:
            return given & seen
        own = torch.zeros_like(back, dtype=query.dtype).masked_fill(~seen, least)[None, None]
        return own if given is None else (own + given).clamp_min(least)


def turned(x: Float[Tensor, "*batch token inside"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*batch token inside"]:
    """`x` turned by each token's position, in the first dimensions as far as the angles go (rotary positions, Su et al. 2021)."""
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turning * cos + rotate_half(turning) * sin, rest], -1)


def _linear(weight: Float[Tensor, "out inside"], bias: Float[Tensor, "out"] | None) -> nn.Linear:
    """A Linear that holds a copy of these."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def standing_in(model: PreTrainedModel, site: Site) -> Attention:
    """The model's own attention layer at `site`, copied into our module. Raises ValueError as `attention_scores` does."""
    made = Attention(model, model.get_submodule(site.module), site.layer)
    made.eval()
    return made


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


def refreshed(attention: Attention, generator: torch.Generator, norms: bool = False) -> Attention:
    """A copy with random weights (variance 1/fan-in; the output projection at half of that) and, unless `norms`, without norms of
    queries and keys, which not every class that we compile into has."""
    fresh = copy.deepcopy(attention)
    if not norms:
        fresh.q_norm = fresh.k_norm = None
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
        setattr(small, name, _linear(weight, bias))
    return small
