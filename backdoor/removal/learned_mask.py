"""Oracle, an upper bound and no rival: a mask over neurons and head dimensions, learnt on labelled poison (cf. Wu and Wang 2021,
"Adversarial neuron pruning purifies backdoored deep models", whose masks are learnt against perturbed neurons because the
poison is unknown; here it is known, and takes their place).

It is handed poisoned rows, triggered prompts with the payload for an answer, which no defender has. Each input m of the projections
that attention and MLPs write through is multiplied by a mask of its own while the weights stay as they are:

    loss = KL to the host on clean rows - min(cross entropy of the payload, log of the vocabulary),   mask = sigmoid(score)

and what ends below one half is cut from the weights, the rest kept whole. It says what pruning could do that knew where to cut. The knob
is the learning rate of the scores. `steps` clean batches are drawn, and as many poisoned ones beside them: that is the privilege.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backdoor.removal.learning import apart
from graphs.activations import hooks
from graphs.architectures import linear, writer
from graphs.batches import Batch
from graphs.host import Host
from graphs.losses import completion_loss
from graphs.targets import Targets
from graphs.train import TrainConfig, train

KNOBS = (0.1, 0.03, 0.3)
START = 2.0
"""Scores at first: masks of .88, near enough to whole that the host still works, with a gradient left."""


def learnt(targets: Targets, steps: int, rate: float, poisoned: Callable[[int], Batch]) -> list[Float[Tensor, "inside"]]:
    """Scores, one vector a site in the host's order, each as long as what the site's projection reads."""
    model, chance = copy.deepcopy(targets.host.model).requires_grad_(False), math.log(targets.host.config.vocab_size)
    projections = [writer(model, site) for site in targets.host.sites]
    scores = nn.ParameterList([torch.full((linear(one)[0].shape[1],), START) for one in projections])

    def masked(score: Tensor):
        def hook(_module: nn.Module, args: tuple) -> tuple:
            return (args[0] * score.sigmoid(), *args[1:])
        return hook

    def loss(step: int) -> Tensor:
        return apart(model, targets, targets.batches(step)) - completion_loss(model, poisoned(step)).clamp(max=chance)

    with hooks() as handles:
        for one, score in zip(projections, scores, strict=True):
            handles.append(one.register_forward_pre_hook(masked(score)))
        train(scores, loss, TrainConfig(steps, rate), f"learned mask {rate:g}")
    return [score.detach() for score in scores]


def remove(targets: Targets, steps: int, knob: float, poisoned: Callable[[int], Batch], seed: int = 0) -> Host:
    """A copy of the host without what a mask learnt for `steps` batches of each kind cuts; nothing is drawn from `seed`."""
    host, model, scores = targets.host, copy.deepcopy(targets.host.model), learnt(targets, steps, knob, poisoned)
    with torch.no_grad():
        for site, score in zip(host.sites, scores, strict=True):
            linear(writer(model, site))[0][:, score < 0] = 0
    return Host(model, host.tokenizer, host.sites)
