"""The two losses that everything is fitted with, in one place so that rivals are trained with exactly the same."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs.batches import Batch


def fvu(y: Float[Tensor, "row token d"], guess: Float[Tensor, "row token d"], real: Bool[Tensor, "row token"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained over real tokens."""
    target, got = y[real], guess[real]
    return (target - got).square().sum() / (target - target.mean(0)).square().sum().clamp_min(1e-8)


def divergence(
    logits: Float[Tensor, "row token vocabulary"], target: Float[Tensor, "row token vocabulary"], batch: Batch, prompt_weight: float
) -> Float[Tensor, ""]:
    """KL(target || logits) in nats per token, over positions that predict a real token; prompts count `prompt_weight`."""
    predicts = batch.real[:, 1:]
    weight = torch.where(batch.completion[:, 1:], 1.0, prompt_weight)[predicts]
    q, p = logits[:, :-1][predicts].log_softmax(-1), target[:, :-1][predicts].log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * weight).sum() / weight.sum()
