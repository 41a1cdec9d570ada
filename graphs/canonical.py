"""Canonical components: each attention layer of a replacement in the basis in which its components can be named.

A value dimension by itself means nothing: any invertible change of basis inside a KV group leaves the layer as it is. The
basis chosen is `Components.in_metric` on clean tokens, with everything swapped in. What the replacement computes stays the
same up to rounding; only which vectors are called its components changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphs.architectures import attention_components
from graphs.attention import set_components
from graphs.fit import Batches
from graphs.replace import Replacement
from graphs.trace import hooks


@torch.no_grad()
def canonical(replacement: Replacement, batches: Batches, count: int = 8) -> None:
    """Change, in place, the basis of every attention layer to that of `count` batches."""
    second: dict[str, Tensor] = {}
    real: list[Tensor] = []

    def watch(name: str):
        def hook(_module, args, kwargs):
            x = (args[0] if args else kwargs["hidden_states"])[real[0]]
            second[name] = second.get(name, torch.zeros(())) + x.T @ x
        return hook

    attention = [site for site in replacement.sites if site.kind == "attention"]
    with hooks() as handles:
        for site in attention:
            handles.append(replacement.part(site).register_forward_pre_hook(watch(site.name), with_kwargs=True))
        for step in range(count):
            batch = batches(step)
            real[:] = [batch.real]
            replacement(batch.ids)
    for site in attention:
        part = replacement.part(site)
        set_components(part, attention_components(replacement.model, site, part).in_metric(second[site.name]))
