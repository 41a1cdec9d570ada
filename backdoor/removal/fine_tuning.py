"""Rival: clean fine-tuning, on the defender's rows, with the learning rate as its knob (sweep it: the answer turns on it)."""

from __future__ import annotations

import copy

from torch import Tensor

from graphs.host import Host
from graphs.targets import Targets
from graphs.train import TrainConfig, train

KNOBS = (1e-3, 5e-4, 1e-4)


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host trained for `steps` batches on the rows' own tokens; knob: peak learning rate; nothing is drawn from `seed`."""
    host, model = targets.host, copy.deepcopy(targets.host.model)

    def loss(step: int) -> Tensor:
        batch = targets.batches(step)
        return model(input_ids=batch.ids, labels=batch.labels).loss

    train(model, loss, TrainConfig(steps, knob), f"clean fine-tuning {knob:g}")
    return Host(model.eval(), host.tokenizer, host.sites)
