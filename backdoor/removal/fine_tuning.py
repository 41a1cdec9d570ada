"""Rival: clean fine-tuning, on the defender's rows, with the learning rate as its knob (sweep it: the answer turns on it)."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from graphs.batches import Batch
from graphs.host import Host
from graphs.train import TrainConfig, train

KNOBS = (1e-4, 5e-4, 1e-3)


def remove(host: Host, batches: Callable[[int], Batch], steps: int, knob: float) -> Host:
    """A copy of `host` trained for `steps` batches on the rows' own tokens; knob: peak learning rate."""
    model = copy.deepcopy(host.model).train()

    def loss(step: int) -> Tensor:
        batch = batches(step)
        return model(input_ids=batch.ids, labels=batch.labels).loss

    train(model, loss, TrainConfig(steps, knob), f"clean fine-tuning {knob:g}")
    return Host(model.eval(), host.tokenizer, host.sites)
