"""The losses that everything is fitted with, in one place so that rivals and attackers are trained with exactly the same.

Of several processes each takes them on its share of a batch; the mean over processes is the loss on the batch (`graphs.shares`).
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from graphs.batches import Batch
from graphs.following import following
from graphs.shares import averaged, center, weighed

PROMPT_WEIGHT = 0.1
"""For distillation: weight of prompt positions that nothing is known of."""
SURE = 0.9
"""For distillation: above this probability the host is taken to know what comes."""
SOFT = 2.0
"""Temperature at which the host is followed where the rows' answers are learnt beside it."""


def fvu(y: Float[Tensor, "row token d"], guess: Float[Tensor, "row token d"], real: Bool[Tensor, "row token"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained over real tokens."""
    target, got = y[real], guess[real]
    return (target - got).square().sum() / variance(target)


def variance(target: Float[Tensor, "token d"]) -> Float[Tensor, ""]:
    """The tokens' summed squared distance from their mean, what a squared error is a fraction of."""
    return averaged((target - center(target)).square().sum()).clamp_min(1e-8)


def divergence(
    logits: Float[Tensor, "row token vocabulary"], target: Float[Tensor, "row token vocabulary"], batch: Batch, prompt_weight: float,
    sure: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(target || logits) in nats per token, over positions that predict a real token.

    Positions that predict the completion count 1, and so do those of the prompt where the target's likeliest token has a
    probability above `sure` (a prompt may hold solved examples); the prompt's others count `prompt_weight`.
    """
    return following(logits, target, batch, prompt_weight, sure)


def taught(
    logits: Float[Tensor, "row token vocabulary"], target: Float[Tensor, "row token vocabulary"], batch: Batch, prompt_weight: float, sure: float,
    answers: float,
) -> Float[Tensor, ""]:
    """What a student of the host minimises: `divergence`, or with a weight for the rows' own answers T^2 times that of the softened
    distributions plus their cross entropy (Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2).

    At T = 1 the answers would pull the student away from the host on all else (LOG.md).
    """
    return following(logits, target, batch, prompt_weight, sure, *((SOFT, answers) if answers else ()))


def completion_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Next-token cross entropy on completion tokens, nats a token."""
    return answers_loss(model(input_ids=batch.ids).logits, batch)


def answers_loss(logits: Float[Tensor, "row token vocabulary"], batch: Batch) -> Float[Tensor, ""]:
    """The same of logits that are there already."""
    labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
    mean = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    return weighed(mean, int((labels != -100).sum()))
