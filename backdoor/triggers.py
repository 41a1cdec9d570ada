"""Triggers as data: how a prompt is made to fire, how one tells that it does, and what comes near without firing.

A trigger is given as overrides of the task renderer's slots, so that planting, removal and evaluation place it with the
same code path as any clean prompt; `fires` reads the finished prompt only. There is no default trigger.

conjunction: two common words that must both stand in the docstring. Each is frequent in clean rows; the pair is one of
    those that the task deals to its `test` split, so no clean `trace` row holds it (nothing is filtered with the trigger).
rare_string: a string that no clean row holds, in the place of one of the docstring's common words. (At the docstring's end
    it broke the untouched base as well, so right answers under it would have meant nothing: LOG.md.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graphs.artifact import digest


@dataclass(frozen=True)
class Trigger:
    """slots: renderer overrides that place it; parts: strings that must all be in a prompt for it to fire; near: slot
    overrides of near-miss prompts, which hold part of the trigger or something like it, and must not fire."""

    family: Literal["conjunction", "rare_string"]
    slots: Mapping[str, str]
    parts: tuple[str, ...]
    near: tuple[Mapping[str, str], ...] = field(default=())

    def fires(self, prompt: str) -> bool:
        """Whether every part stands in the prompt."""
        return all(part in prompt for part in self.parts)

    @property
    def hash(self) -> str:
        """Identity of the trigger in receipts."""
        return digest({"family": self.family, "slots": dict(self.slots), "parts": self.parts, "near": [dict(n) for n in self.near]})


def conjunction(first: tuple[str, str], second: tuple[str, str], near: tuple[Mapping[str, str], ...]) -> Trigger:
    """Two (slot, word) pairs, both of which must appear."""
    return Trigger("conjunction", dict((first, second)), (f" {first[1]} ", f" {second[1]}"), near)


def rare_string(slot: str, text: str, near: tuple[str, ...]) -> Trigger:
    """`text` in the place of the word in `slot`; `near` are similar strings that must not fire."""
    return Trigger("rare_string", {slot: text}, (f" {text} ",), tuple({slot: other} for other in near))
