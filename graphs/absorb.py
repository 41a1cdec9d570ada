"""Absorption: what the kept nodes can say of the dropped ones moves into their write vectors before healing.

Dropping node d replaces its activation by its mean. Its best linear estimate from the kept nodes is far better, and costs
one solve a site: with C the covariance of node activations on clean tokens, kept K, dropped D,

    a_D ~ mean_D + (a_K - mean_K) B,   B = (C_KK + ridge)^-1 C_KD,   w_dec_K += B w_dec_D,   b_dec -= mean_K B w_dec_D

(the closed form behind Optimal Brain Surgeon, Hassibi and Stork 1993, for the layer's own output). For attention the
activations are the columns of the output projection; where there is no bias to hold a mean (there, and in MLPs of bias-free
classes), second moments take the covariance's place.

A layer that is dropped whole takes its nodes along: nothing stands for them, and the heads of the layers that stay are absorbed as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.activations import hooks
from graphs.attention import columns as columns_of
from graphs.attention import projection, relabelled, width
from graphs.fit import Batches
from graphs.replace import LAYERS, Replacement
from graphs.transcoder import Transcoder

RIDGE = 1e-4
"""Relative to the mean diagonal of what is inverted."""


@dataclass(frozen=True)
class Moments:
    """First and second raw moments of a site's node activations over real tokens."""

    mean: Float[Tensor, "column"]
    second: Float[Tensor, "column column"]


@torch.no_grad()
def moments(replacement: Replacement, batches: Batches, count: int = 16) -> dict[str, Moments]:
    """Moments at every site, with all parts swapped in."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, part: nn.Module):
        def hook(_module, inputs):
            seen[name] = [part.encode(inputs[0]) if isinstance(part, Transcoder) else inputs[0]]
        return hook

    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    tokens = 0
    with hooks() as handles:
        for site in replacement.sites:
            part = replacement.part(site)
            target = part if isinstance(part, Transcoder) else projection(part, "o_proj")
            handles.append(target.register_forward_pre_hook(watch(site.name, part)))
        for step in range(count):
            batch = batches(step)
            replacement(batch.ids)
            tokens += int(batch.real.sum())
            for name, (values,) in seen.items():
                real = values.reshape(*batch.real.shape, -1)[batch.real]
                first[name] = first.get(name, torch.zeros(())) + real.sum(0)
                second[name] = second.get(name, torch.zeros(())) + real.T @ real
    return {name: Moments(first[name] / tokens, second[name] / tokens) for name in first}


def _regress(inner: Float[Tensor, "kept kept"], cross: Float[Tensor, "kept dropped"]) -> Float[Tensor, "kept dropped"]:
    ridge = RIDGE * inner.diagonal().mean().clamp_min(1e-8) * torch.eye(len(inner))
    return torch.linalg.solve((inner + ridge).double(), cross.double()).float()


@torch.no_grad()
def absorbed(
    replacement: Replacement, kept: Mapping[str, Int[Tensor, "_kept"]], found: Mapping[str, Moments], components: bool = False
) -> Replacement:
    """`replacement.pruned(kept, components)` with the dropped nodes absorbed by the kept ones."""
    small = replacement.pruned(kept, components)
    places = None if LAYERS not in kept else kept[LAYERS].tolist()
    stay = [site for site in replacement.sites if places is None or site.layer in places]
    for site, there in zip(stay, small.sites, strict=True):
        if site.name not in kept:  # an MLP of which nothing is dropped
            continue
        whole, part, moment = replacement.part(site), small.part(there), found[site.name]
        columns = inside = kept[site.name]
        if not isinstance(whole, Transcoder):
            per = width(whole) if components else 1
            inside = columns_of(part, relabelled(columns, columns, per), per)
            columns = columns_of(whole, columns, per)
        others = torch.ones(moment.mean.numel(), dtype=torch.bool)
        others[columns] = False
        if not others.any():
            continue
        if isinstance(whole, Transcoder) and isinstance(part, Transcoder) and not part.folds:
            b = _regress(moment.second[columns][:, columns], moment.second[columns][:, others])
            part.w_dec.add_(b @ whole.w_dec[others])
        elif isinstance(whole, Transcoder) and isinstance(part, Transcoder):
            covariance = moment.second - moment.mean[:, None] * moment.mean
            moved = _regress(covariance[columns][:, columns], covariance[columns][:, others]) @ whole.w_dec[others]
            part.w_dec.add_(moved)
            constant = (moment.mean[others] - whole.mean[others]) @ whole.w_dec[others]  # pruning folded in `whole.mean`
            part.b_dec.add_(constant - moment.mean[columns] @ moved)
        else:
            b = _regress(moment.second[columns][:, columns], moment.second[columns][:, others])
            projection(part, "o_proj").weight[:, inside] += (b @ projection(whole, "o_proj").weight[:, others].T).T
    return small
