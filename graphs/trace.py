"""Tracing: everything an edge needs of a run, and the same run again with everything frozen.

`trace` runs the model once and keeps, per site, what it read, 1 / scale of its norm, what it wrote, and attention patterns.
`Frozen` runs the very same model with those held: each norm keeps its recorded scale, each sublayer writes what it wrote,
so that between nodes only the residual stream is left, and it is linear. A nudge of one node then moves every later drive
by exactly the edge, which is how edges are proven (cf. Ameisen et al. 2025, "Circuit tracing", section "Validating the
replacement model"). The frozen run goes through the library's own forward pass: it shares no code with `edges`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.activations import first, hooks
from graphs.architectures import architecture, norm, post_norm
from graphs.host import Host

FINAL = "final"
"""Name of the last norm among the readers."""


@dataclass(frozen=True)
class SiteTrace:
    """x: what the site read; inverse: 1 / scale of its norm; y: what was added to the stream; pattern: of an attention layer
    (or of its stand-in); post: 1 / scale of a post-norm; rotary: (cos, sin) by which an attention layer turns queries and keys."""

    x: Float[Tensor, "row token d_in"]
    inverse: Float[Tensor, "row token"]
    y: Float[Tensor, "row token d_out"]
    pattern: Float[Tensor, "row head token source"] | None = None
    post: Float[Tensor, "row token"] | None = None
    rotary: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Trace:
    """One run on a batch. token and position: what embeddings put into the stream; logits: before any soft cap."""

    ids: Int[Tensor, "row token"]
    token: Float[Tensor, "row token d"]
    position: Float[Tensor, "row token d"]
    sites: dict[str, SiteTrace]
    inverse: Float[Tensor, "row token"]
    logits: Float[Tensor, "row token vocabulary"]


@contextmanager
def eager(configs: Sequence[Any]) -> Iterator[None]:
    """Attention that returns its patterns, inside the block, wherever one of `configs` is read."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def routing(stand_ins: Mapping[str, nn.Module], name: str, args: tuple, kwargs: dict, output: tuple) -> Float[Tensor, "row head token source"]:
    """The attention pattern at a site: the layer's own, or its stand-in's on the same input."""
    if name not in stand_ins:
        return output[1]
    inside = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "layer_past", "use_cache")}
    return stand_ins[name](*args, **inside)[1]


@torch.no_grad()
def trace(host: Host, ids: Int[Tensor, "row token"], stand_ins: Mapping[str, nn.Module] | None = None) -> Trace:
    """Run `host` on `ids`. stand_ins: attention modules by site name whose patterns on the host's inputs are wanted instead."""
    model, stand_ins = host.model, stand_ins or {}
    seen: dict[str, dict] = {site.name: {} for site in host.sites}
    ends: dict[str, Tensor] = {}
    row = architecture(model)
    shape = (*ids.shape, model.config.hidden_size)

    def stream(name: str):
        def hook(_module, args, kwargs, output):
            seen[name]["stream"] = (args[0] if args else kwargs["hidden_states"]).detach().reshape(shape)
            seen[name]["x"] = output.detach().reshape(shape)
        return hook

    def wrote(name: str):
        def hook(_module, args, output):
            seen[name]["y"], seen[name]["inside"] = first(output).detach().reshape(shape), args[0].detach() if args else None
        return hook

    def pattern(name: str):
        def hook(_module, args, kwargs, output):
            seen[name]["pattern"] = routing(stand_ins, name, args, kwargs, output).detach()
            seen[name]["rotary"] = kwargs.get("position_embeddings")
        return hook

    def end(name: str):
        def hook(_module, args, output):
            ends[name] = output.detach()
            ends[f"{name} in"] = args[0].detach()
        return hook

    with eager([model.config, *(part.config for part in stand_ins.values())]), hooks() as handles:
        for site in host.sites:
            handles.append(host.module(site.norm).register_forward_hook(stream(site.name), with_kwargs=True))
            handles.append(host.module(site.writes).register_forward_hook(wrote(site.name)))
            if site.kind == "attention":
                handles.append(host.module(site.module).register_forward_hook(pattern(site.name), with_kwargs=True))
        handles.append(host.module(row.final_norm).register_forward_hook(end(FINAL)))
        handles.append(model.get_output_embeddings().register_forward_hook(end("logits")))
        model(input_ids=ids, use_cache=False)
    start = seen[host.sites[0].name]["stream"]
    token = model.get_input_embeddings()(ids).detach()
    found = {}
    for site in host.sites:
        got, post = seen[site.name], post_norm(model, site)
        found[site.name] = SiteTrace(got["x"], norm(model, site.norm).inverse(got["stream"]), got["y"], got.get("pattern"),
                                     None if post is None else post.inverse(got["inside"]), got.get("rotary"))
    return Trace(ids, token, start - token, found, norm(model, row.final_norm).inverse(ends[f"{FINAL} in"]), ends["logits"])


@dataclass(frozen=True)
class Frozen:
    """The host with norms' scales and sublayers' outputs held at what `trace` saw."""

    host: Host
    trace: Trace

    @torch.no_grad()
    def run(
        self, nudges: Mapping[str, Float[Tensor, "run token d"]]
    ) -> tuple[dict[str, Float[Tensor, "run token d"]], Float[Tensor, "run token vocabulary"]]:
        """What each site reads, and the logits, when `nudges` (by site name, or "embedding") are added to what was written.

        A one-row trace may be run many times at once, each row of the nudges a run.
        """
        model, row = self.host.model, architecture(self.host.model)
        read: dict[str, Tensor] = {}
        runs = max([len(self.trace.ids), *(len(nudge) for nudge in nudges.values())])
        shape = (runs, *self.trace.token.shape[1:])

        def hold(path: str, inverse: Tensor, names: list[str]):
            frozen = norm(model, path)

            def hook(_module, args, kwargs, output):
                stream = args[0] if args else kwargs["hidden_states"]
                x = frozen.frozen(stream.reshape(shape), inverse.expand(shape[:2]))
                read.update({name: x for name in names})
                return x.reshape(output.shape)
            return hook

        def write(name: str):
            def hook(_module, _args, output):
                y = (self.trace.sites[name].y + nudges.get(name, torch.zeros(()))).expand(shape)
                held = y.reshape(first(output).shape)
                return (held, *output[1:]) if isinstance(output, tuple) else held
            return hook

        def embed(_module, _args, output):
            return output + nudges.get("embedding", torch.zeros(()))

        logits = []
        with hooks() as handles:
            by_norm: dict[str, list[str]] = {}
            for site in self.host.sites:
                by_norm.setdefault(site.norm, []).append(site.name)
                handles.append(self.host.module(site.writes).register_forward_hook(write(site.name)))
            for path, names in by_norm.items():
                handles.append(self.host.module(path).register_forward_hook(
                    hold(path, self.trace.sites[names[0]].inverse, names), with_kwargs=True))
            last = hold(row.final_norm, self.trace.inverse, [FINAL])
            handles.append(self.host.module(row.final_norm).register_forward_hook(last, with_kwargs=True))
            handles.append(model.get_input_embeddings().register_forward_hook(embed))
            handles.append(model.get_output_embeddings().register_forward_hook(lambda _m, _a, output: logits.append(output)))
            model(input_ids=self.trace.ids.expand(runs, -1), use_cache=False)
        return read, logits[0]
