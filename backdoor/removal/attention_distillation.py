"""Rival: NAD (Li, Lyu, Koren, Lyu, Li and Ma 2021, "Neural attention distillation: erasing backdoor triggers from deep neural networks",
ICLR, section 3).

The teacher is the host fine-tuned on the clean rows; the student is the host, fine-tuned on the same rows while its attention maps,
layer by layer, are drawn to the teacher's:

    A(h)_t = sum over d of h[t, d]^2                                   the paper's A^2_sum; its pixels are tokens here
    loss   = cross entropy + beta * sum over layers of || A / |A| of the student - A / |A| of the teacher ||^2

with h the residual stream after a layer and the norms taken over a row's tokens. The square is that of the authors' code (the paper
writes the norm itself, which pulls as hard near the teacher as far from it). beta is the knob: the paper's are hundreds and more, because
its code averages over a map's pixels. Half of `steps` makes the teacher, the rest the student.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from backdoor.removal import fine_tuning
from graphs.activations import streams
from graphs.batches import Batch
from graphs.host import Host
from graphs.targets import Targets
from graphs.train import TrainConfig, train

KNOBS = (10.0, 3.0, 30.0)
LEARNING_RATE = 5e-4


def attention_map(stream: Float[Tensor, "row token d"], real: Bool[Tensor, "row token"]) -> Float[Tensor, "row token"]:
    """How much of a row's activity lies on each of its tokens, as a vector of norm 1 a row; pads have none."""
    return nn.functional.normalize(stream.float().square().sum(-1) * real, dim=-1)


def distance(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """Squared distance between the two models' attention maps: summed over layers, mean over rows."""
    with torch.no_grad(), streams(teacher) as wanted:
        teacher.base_model(input_ids=batch.ids)
    with streams(model) as states:
        model.base_model(input_ids=batch.ids)
    apart = [attention_map(a, batch.real) - attention_map(b, batch.real) for a, b in zip(states, wanted, strict=True)]
    return torch.stack([one.square().sum(-1).mean() for one in apart]).sum()


def drawn_to(teacher: PreTrainedModel, targets: Targets, start: int, end: int, knob: float) -> Host:
    """A copy of the host fine-tuned on the batches start .. end - 1, its maps drawn to the teacher's with weight `knob`."""
    host, model = targets.host, copy.deepcopy(targets.host.model)

    def loss(step: int) -> Tensor:
        batch = targets.batches(start + step)
        return model(input_ids=batch.ids, labels=batch.labels).loss + knob * distance(model, teacher, batch)

    train(model, loss, TrainConfig(end - start, LEARNING_RATE), f"NAD {knob:g}")
    return Host(model.eval(), host.tokenizer, host.sites)


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host fine-tuned towards a fine-tuned teacher; knob: beta, the weight of the maps; nothing is drawn from `seed`."""
    first = steps // 2
    return drawn_to(fine_tuning.remove(targets, first, LEARNING_RATE).model, targets, first, steps, knob)
