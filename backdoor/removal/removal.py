"""Removal: what every method is to the bench, and the list of them all.

A method is a function of (the host with its clean batches, how many of them, its knob, a seed) that returns a new model and leaves
the given one alone. Equal training tokens: it draws each of the batches 0 .. steps - 1 once, and a method of several phases splits
them among its phases. Measuring without a gradient (Fine-Pruning's activities, the token filter's counts) is no training.

Rivals see clean rows only. Oracles are handed poisoned rows beside them, which no defender has: they say how far a method could get
that knows the answer, and stand in the table as upper bounds. Layer drop is not in the list: its knob is a size (distill/rivals.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from backdoor.removal import (
    attention_distillation,
    crow,
    dense_refit,
    dummy_backdoor,
    embedding_only,
    fine_pruning,
    fine_tuning,
    gradient_ascent,
    learned_mask,
    random_student,
    token_filter,
    undo,
    written_text,
)
from graphs.batches import Batch
from graphs.host import Host
from graphs.targets import Targets


@runtime_checkable
class Remove(Protocol):
    """The one signature. targets: the host, the defender's clean batches and the host's logits on them; steps: batches to train on;
    knob: the method's own, a learning rate where it has none; seed: of whatever it draws."""

    def __call__(self, targets: Targets, steps: int, knob: float, *, seed: int) -> Host: ...


@dataclass(frozen=True)
class Removal:
    """A method. knobs: three values to try on development backdoors, the middle one first; blind: it never sees a poisoned row."""

    name: str
    knobs: tuple[float, ...]
    remove: Remove
    blind: bool = True


def rivals(rate: float, decay: float, written: Callable[[int], Batch] | None = None) -> tuple[Removal, ...]:
    """The blind methods. rate, decay: peak learning rate and weight decay of our own healing, for those that heal as ours does;
    written: batches of rows that the host wrote to the clean rows' prompts (without them, no student is trained on them)."""
    def refit(targets: Targets, steps: int, knob: float, *, seed: int) -> Host:
        student = random_student.fresh(targets.host.model, targets.host, seed)
        return dense_refit.remove(targets, student, steps // 2, steps, knob, rate, decay)

    def rewrite(targets: Targets, steps: int, knob: float, *, seed: int) -> Host:
        assert written is not None
        return written_text.remove(random_student.fresh(targets.host.model, targets.host, seed), written, steps, knob)

    found = (
        Removal("clean fine-tuning", (5e-4, 1e-4, 1e-3), fine_tuning.remove),
        Removal("KL to a random student", random_student.KNOBS, random_student.remove),
        Removal("UNDO", (0.6, 0.3, 0.8), partial(undo.remove, learning_rate=rate, decay=decay)),
        Removal("dense refit", (4e-3, 2e-3, 8e-3), refit),
        Removal("dummy backdoor", dummy_backdoor.KNOBS, dummy_backdoor.remove),
        Removal("CROW", crow.KNOBS, crow.remove),
        Removal("Fine-Pruning", fine_pruning.KNOBS, fine_pruning.remove),
        Removal("NAD", attention_distillation.KNOBS, attention_distillation.remove),
        Removal("token filter", token_filter.KNOBS, token_filter.remove),
        Removal("embedding only", embedding_only.KNOBS, embedding_only.remove),
    )
    return found if written is None else (*found, Removal("written text", (4e-3, 2e-3, 8e-3), rewrite))


def oracles(poisoned: Callable[[int], Batch]) -> tuple[Removal, ...]:
    """The methods that are told the answer, as upper bounds. poisoned: batches of triggered prompts with the payload for an answer, of
    which they draw as many as of the clean ones."""
    return (
        Removal("oracle: gradient ascent", gradient_ascent.KNOBS, partial(gradient_ascent.remove, poisoned=poisoned), blind=False),
        Removal("oracle: learned mask", learned_mask.KNOBS, partial(learned_mask.remove, poisoned=poisoned), blind=False),
    )
