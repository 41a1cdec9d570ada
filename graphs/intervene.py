"""Interventions: run a model with chosen nodes held at chosen values, or edges cut, and everything after them free to answer.

A node's value is read from what its site reads in this very run, so an earlier intervention is seen by later nodes; the site
then writes what it would, plus (value - activation) times the node's write vector, at every token. Errors stay as they are.
An edge is cut by letting its target alone see the source at another value (path patching: Goldowsky-Dill et al. 2023).
Nothing is frozen: this is what a claim about behaviour must survive, while `graphs.trace.Frozen` proves single edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.architectures import Norm, Site, norm, post_norm
from graphs.components import Components
from graphs.edges import Reconstruction
from graphs.trace import eager, first, hooks, routing


@dataclass(frozen=True)
class Held:
    """Nodes of one site, and the value each is held at: one for all tokens, or one a token."""

    nodes: Int[Tensor, "node"]
    values: Float[Tensor, "node"] | Float[Tensor, "row token node"]


@dataclass(frozen=True)
class Cut:
    """One edge: `target` reads `source` as if it had `value` (one for all tokens, or one a token); everything else reads it as it is. Both
    ends are (site name, node)."""

    source: tuple[str, int]
    target: tuple[str, int]
    value: Float[Tensor, ""] | Float[Tensor, "row token"]


@dataclass
class _Run:
    """What sites read in this run: x, 1 / scale of the norm, patterns, 1 / scale of post-norms."""

    subject: Reconstruction
    shape: tuple[int, ...]
    x: dict[str, Tensor]
    inverse: dict[str, Tensor]
    pattern: dict[str, Tensor]
    post: dict[str, Tensor]

    def values(self, site: str, nodes: Int[Tensor, "node"]) -> Float[Tensor, "row token node"]:
        """Activations of a site's nodes."""
        part, x = self.subject.basis[site], self.x[site]
        every = part.activations(x, self.pattern[site], self.post.get(site)) if isinstance(part, Components) else part.activations(x)
        return every[..., nodes]

    def shift(self, site: str, held: Held | None, cuts: Sequence[Cut]) -> Float[Tensor, "row token d"]:
        """What interventions on a site's nodes add to what it writes."""
        written = self.subject.basis[site].writes
        moved = torch.zeros(())
        if held is not None:
            moved = moved + (held.values - self.values(site, held.nodes)) @ written[held.nodes]
        for node in sorted({cut.target[1] for cut in cuts}):
            change = self._drive_change(site, node, [cut for cut in cuts if cut.target[1] == node])
            moved = moved + self._response(site, node, change)[..., None] * written[node]
        return moved

    def _drive_change(self, site: str, node: int, cuts: Sequence[Cut]) -> Float[Tensor, "row token"]:
        """How the node's drive changes when its sources are seen at other values."""
        host, part = self.subject.host, self.subject.basis[site]
        pulled = norm(host.model, host.site(site).norm).pulled(part.reads[node])
        total = torch.zeros(())
        for cut in cuts:
            where, source = cut.source
            excess = cut.value - self.values(where, torch.tensor([source]))[..., 0]
            total = total + excess * self.inverse[site] * (pulled @ self.subject.basis[where].writes[source])
        if isinstance(part, Components):
            routed = torch.einsum("rts,rs->rt", self.pattern[site][:, node // part.write.shape[1]], total)
            return routed * self.post[site] if site in self.post else routed
        return total * part.factor(self.x[site])[..., node]

    def _response(self, site: str, node: int, change: Float[Tensor, "row token"]) -> Float[Tensor, "row token"]:
        """How the node's activation answers to a change of its drive."""
        part = self.subject.basis[site]
        if isinstance(part, Components):
            return change
        at = node
        for one in part.parts:
            if at < len(one.read):
                drive = one.drive(self.x[site])
                new = drive.clone()
                new[..., at] += change
                return one.gate(new)[..., at] - one.gate(drive)[..., at]
            at -= len(one.read)
        raise IndexError(node)


def run(
    subject: Reconstruction, ids: Int[Tensor, "row token"], held: Mapping[str, Held], cuts: Sequence[Cut] = ()
) -> Float[Tensor, "row token vocabulary"]:
    """Logits with nodes held, by site name, and edges cut. Differentiable."""
    host = subject.host
    now = _Run(subject, (*ids.shape, host.config.hidden_size), {}, {}, {}, {})
    configs = [host.model.config, *(part.config for part in subject.stand_ins.values())]

    def reading(path: str, names: list[str]):
        through = norm(host.model, path)

        def hook(_module, args, kwargs, output):
            stream = args[0] if args else kwargs["hidden_states"]
            inverse = through.inverse(stream.reshape(now.shape))
            for name in names:
                now.x[name], now.inverse[name] = output.reshape(now.shape), inverse
        return hook

    def scaling(site: Site, through: Norm):
        def hook(_module, args, _output):
            now.post[site.name] = through.inverse(args[0].reshape(now.shape))
        return hook

    def attending(site: Site):
        def hook(_module, args, kwargs, output):
            now.pattern[site.name] = routing(subject.stand_ins, site.name, args, kwargs, output)
        return hook

    def writing(site: Site, mine: list[Cut]):
        def hook(_module, args, output):
            y = first(output)
            moved = y + now.shift(site.name, held.get(site.name), mine).reshape(y.shape)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved
        return hook

    with eager(configs), hooks() as handles:
        by_norm: dict[str, list[str]] = {}
        for site in host.sites:
            by_norm.setdefault(site.norm, []).append(site.name)
            mine = [cut for cut in cuts if cut.target[0] == site.name]
            if (after := post_norm(host.model, site)) is not None:
                handles.append(host.module(site.writes).register_forward_hook(scaling(site, after)))  # before what writes: hooks run in order
            if site.kind == "attention":
                handles.append(host.module(site.module).register_forward_hook(attending(site), with_kwargs=True))
            if site.name in held or mine:
                handles.append(host.module(site.writes).register_forward_hook(writing(site, mine)))
        for path, names in by_norm.items():
            handles.append(host.module(path).register_forward_hook(reading(path, names), with_kwargs=True))
        return host.model(input_ids=ids, use_cache=False).logits


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
