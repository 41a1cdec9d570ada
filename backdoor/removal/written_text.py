"""Rival: a fresh model of the checkpoint's shapes, trained from scratch on task text that the model wrote.

What a practitioner without a graph would do: let the model answer the task's prompts, several times at temperature 1, and train a
small model on the answers (sequence-level distillation, Kim and Rush 2016). It sees tokens only: no logits, no activations.
"""

from __future__ import annotations

from collections.abc import Callable

from backdoor.removal.learning import from_tokens
from graphs.batches import Batch
from graphs.host import Host

KNOBS = (4e-3, 2e-3)


def remove(student: Host, batches: Callable[[int], Batch], steps: int, knob: float) -> Host:
    """Train `student` (random block weights) on the tokens of `batches` of written rows; knob: peak learning rate."""
    from_tokens(student.model, batches, steps, knob, f"written text {knob:g}", decay=0.1)
    return student
