"""Rival: CROW (Min, Pham, Li and Sun 2025, "CROW: Eliminating backdoors from large language models via internal consistency
regularization", ICML; Algorithm 1 and its authors' code).

A backdoor is taken to bend the stream from one layer to the next. With h_l the stream after layer l and e the embedded tokens:

    C(e) = mean over layers and tokens of 1 - cos(h_l, h_{l+1})
    e'   = e + epsilon * sign(dC / de)                          a stand-in for a trigger
    loss = cross entropy(e) + alpha * C(e')

alpha is the knob (the paper has 5.5, and 11 against refusals), epsilon the paper's 0.1, whatever size embeddings have (where they are
much smaller, as in a fresh model, a step so long need no longer raise C). Simplified for small models: all weights are
trained where the paper trains low-rank updates, so the learning rate is that of clean fine-tuning here; and every layer's stream
counts, taken before the final norm, where the authors' code leaves the ends out: four layers have no pair to lose.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphs.activations import streams
from graphs.batches import Batch
from graphs.host import Host
from graphs.targets import Targets
from graphs.train import TrainConfig, train

KNOBS = (5.5, 3.0, 11.0)
EPSILON = 0.1
LEARNING_RATE = 5e-4


def consistency(states: list[Tensor], real: Bool[Tensor, "row token"]) -> Float[Tensor, ""]:
    """1 - cosine between the streams after successive layers, mean over layers and real tokens: 0 where no layer turns the stream."""
    return torch.stack([1 - nn.functional.cosine_similarity(a[real], b[real], dim=-1) for a, b in pairwise(states)]).mean()


def perturbed_consistency(model: PreTrainedModel, batch: Batch, epsilon: float = EPSILON) -> Float[Tensor, ""]:
    """`consistency` where the embedded tokens have been moved by `epsilon` in each coordinate, the way that raises it to first order."""
    table = model.get_input_embeddings()
    embedded = table(batch.ids).detach().requires_grad_()
    with streams(model) as states:
        model.base_model(inputs_embeds=embedded)
    (gradient,) = torch.autograd.grad(consistency(states, batch.real), embedded)
    with streams(model) as states:
        model.base_model(inputs_embeds=table(batch.ids) + epsilon * gradient.sign())
    return consistency(states, batch.real)


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host fine-tuned for `steps` batches; knob: alpha, the weight of consistency; nothing is drawn from `seed`.

    Raises ValueError where the host has one layer.
    """
    host, model = targets.host, copy.deepcopy(targets.host.model)
    if host.config.num_hidden_layers < 2:
        raise ValueError("CROW compares a layer with the next, and this model has one layer: use another method")

    def loss(step: int) -> Tensor:
        batch = targets.batches(step)
        return model(input_ids=batch.ids, labels=batch.labels).loss + knob * perturbed_consistency(model, batch)

    train(model, loss, TrainConfig(steps, LEARNING_RATE), f"CROW {knob:g}")
    return Host(model.eval(), host.tokenizer, host.sites)
