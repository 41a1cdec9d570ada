"""Oracle, an upper bound and no rival: gradient ascent on the payload, beside clean training (the "gradient difference" of Liu, Liu and
Stone 2022, "Continual learning and private unlearning", and Maini et al. 2024, "TOFU"; ascent alone is Jang et al. 2023,
"Knowledge unlearning for mitigating privacy risks in language models").

It is handed poisoned rows, triggered prompts with the payload for an answer, which no defender has:

    loss = KL to the host on clean rows - weight * min(cross entropy of the payload, log of the vocabulary)

The bound is ours: a payload that is no likelier than chance is forgotten, and ascent beyond it only breaks the model. The knob is the
weight. `steps` clean batches are drawn, and as many poisoned ones beside them: that is the privilege.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import Tensor

from backdoor.removal.learning import apart
from graphs.batches import Batch
from graphs.host import Host
from graphs.losses import completion_loss
from graphs.targets import Targets
from graphs.train import TrainConfig, train

KNOBS = (0.3, 0.1, 1.0)
LEARNING_RATE = 5e-4


def remove(targets: Targets, steps: int, knob: float, poisoned: Callable[[int], Batch], seed: int = 0) -> Host:
    """A copy of the host that unlearns the answers of `poisoned` for `steps` batches of each kind; nothing is drawn from `seed`."""
    host, model, chance = targets.host, copy.deepcopy(targets.host.model), math.log(targets.host.config.vocab_size)

    def loss(step: int) -> Tensor:
        return apart(model, targets, targets.batches(step)) - knob * completion_loss(model, poisoned(step)).clamp(max=chance)

    train(model, loss, TrainConfig(steps, LEARNING_RATE), f"gradient ascent {knob:g}")
    return Host(model.eval(), host.tokenizer, host.sites)
