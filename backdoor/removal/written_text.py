"""Rival: a fresh model of the checkpoint's shapes, trained from scratch on task text that the model wrote.

What a practitioner without a graph would do: let the model answer the task's prompts, several times at temperature 1, and train a
small model on the answers (sequence-level distillation, Kim and Rush 2016). It sees tokens only: no logits, no activations.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from graphs.batches import Batch
from graphs.host import Host
from graphs.train import TrainConfig, train

KNOBS = (4e-3, 2e-3)


def remove(student: Host, batches: Callable[[int], Batch], steps: int, knob: float) -> Host:
    """Train `student` (random block weights) on the tokens of `batches` of written rows; knob: peak learning rate."""
    def loss(step: int) -> Tensor:
        batch = batches(step)
        return student.model(input_ids=batch.ids, labels=batch.labels).loss

    train(student.model, loss, TrainConfig(steps, knob, weight_decay=0.1), f"written text {knob:g}")
    student.model.eval()
    return student
