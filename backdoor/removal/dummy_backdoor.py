"""Rival: plant a backdoor of one's own, then unlearn it (Lin et al. 2025, "Backdoor collapse: eliminating unknown threats via known
backdoor aggregation in language models": Locphylax, its two stages).

Planting known triggers in a model that already has an unknown one is said to gather both in one place of the representation, so that
training the known triggers back to right answers takes the unknown one along.

    1. aggregation: half of each batch gets a known trigger in its prompt and the known payload as its answer
    2. recovery: half of each batch gets a known trigger in its prompt and keeps its own answer

The other half stays as it is; the loss is cross entropy on all tokens of a row. Half of `steps` goes to each stage, and the rows come
from the clean batches alone. Simplified: three triggers of three tokens and one payload, all drawn by the seed from tokens of the clean
rows; the paper's are words and sentences of a language that our small models do not have. All weights are trained. The knob is the
learning rate.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from backdoor.removal.learning import from_tokens
from graphs.batches import Batch, Encoded, Epochs, collate
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (5e-4, 2e-4, 1e-3)
TRIGGERS, LENGTH, PAYLOAD = 3, 3, 8
"""Known triggers, tokens in each, and tokens of the known payload."""


@dataclass(frozen=True)
class Dummy:
    """A backdoor that the defender knows. triggers: token ids to stand in a prompt; payload: those of the answer, EOS included;
    room: tokens that a row may have in all."""

    triggers: tuple[tuple[int, ...], ...]
    payload: tuple[int, ...]
    room: int

    def triggered(self, row: Encoded, place: random.Random) -> Encoded:
        """The row with a trigger put in its prompt, behind the first token, and its own answer; unchanged where there is no room."""
        trigger = place.choice(self.triggers)
        if len(row.ids) + len(trigger) > self.room:
            return row
        at = place.randint(min(1, row.prompt), row.prompt)
        return Encoded((*row.ids[:at], *trigger, *row.ids[at:]), row.prompt + len(trigger))

    def poisoned(self, row: Encoded, place: random.Random) -> Encoded:
        """The triggered row with the payload for an answer; unchanged where there is no room."""
        found = self.triggered(row, place)
        ids = (*found.ids[: found.prompt], *self.payload)
        return row if found is row or len(ids) > self.room else Encoded(ids, found.prompt)


def drawn(rows: Epochs, room: int, seed: int) -> Dummy:
    """A dummy whose tokens all stand in the clean rows, so that only their sequence is new."""
    draw = random.Random(f"dummy/{seed}")
    met = sorted({token for row in rows.rows for token in row.ids} - {rows.pad})
    triggers = tuple(tuple(draw.choices(met, k=LENGTH)) for _ in range(TRIGGERS))
    return Dummy(triggers, (*draw.choices(met, k=PAYLOAD), rows.pad), room)


def mixed(rows: Epochs, step: int, change: Callable[[Encoded, random.Random], Encoded]) -> Batch:
    """The clean batch of `step` with every second row changed."""
    place = random.Random(f"dummy/{rows.seed}/{step}")
    chosen = [rows.rows[index] for index in rows(step).rows]
    return collate([change(row, place) if order % 2 == 0 else row for order, row in enumerate(chosen)], rows.pad)


def stage(model: PreTrainedModel, rows: Epochs, change: Callable[[Encoded, random.Random], Encoded], start: int, end: int, rate: float) -> None:
    """Train in place on the batches start .. end - 1, changed."""
    from_tokens(model, lambda step: mixed(rows, start + step, change), end - start, rate, f"dummy backdoor {rate:g}")


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host that a dummy was planted in and unlearnt from, `steps` batches in all; knob: peak learning rate."""
    host, model, half = targets.host, copy.deepcopy(targets.host.model), steps // 2
    dummy = drawn(targets.batches, host.config.max_position_embeddings, seed)
    stage(model, targets.batches, dummy.poisoned, 0, half, knob)
    stage(model, targets.batches, dummy.triggered, half, steps, knob)
    return Host(model, host.tokenizer, host.sites)
