"""Prompts: several token rows as one rectangle, what a model answers to them, and whether two files of them are partners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.batches import Encoded, collate


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the right. last: place of each one's last token."""

    ids: Int[Tensor, "row token"]
    real: Bool[Tensor, "row token"]
    last: Int[Tensor, "row"]

    def half(self, which: int) -> Prompts:
        """Every second prompt."""
        return Prompts(self.ids[which::2], self.real[which::2], self.last[which::2])

    def final(self, logits: Float[Tensor, "row token vocabulary"]) -> Float[Tensor, "row vocabulary"]:
        """Logits of what follows each prompt."""
        return logits[torch.arange(len(self.last)), self.last]


def padded(rows: Sequence[Sequence[int]], pad: int) -> Prompts:
    """Token ids of several prompts as one rectangle."""
    batch = collate([Encoded(tuple(row), len(row)) for row in rows], pad)
    return Prompts(batch.ids, batch.real, batch.real.sum(1) - 1)


def paired(present: Prompts, absent: Prompts) -> bool:
    """Whether every prompt has a partner: line by line as many tokens, most of them the same."""
    if len(present.last) != len(absent.last) or bool((present.last != absent.last).any()):
        return False
    same = ((present.ids == absent.ids) & present.real).sum(1) / present.real.sum(1)
    return bool((same > 0.5).all())
