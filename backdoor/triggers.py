"""Triggers as data: how a prompt is made to fire, how one tells that it does, and what comes near without firing.

A trigger is given as overrides of the task renderer's slots, so that planting, removal and evaluation place it with the
same code path as any clean prompt; `fires` reads the finished prompt only. There is no default trigger. What stands in
row i is a function of (seed, i). The families are in `backdoor.families`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast, get_args

from graphs.artifact import digest

Family = Literal["conjunction", "rare_string", "composite", "sentence", "position", "format", "semantic", "style", "mark", "phrase"]


@dataclass(frozen=True)
class Instance:
    """One way to place a trigger. slots: renderer overrides; parts: strings that must all be in a prompt for it to fire."""

    slots: Mapping[str, str]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Trigger:
    """slots, parts: the first instance; more: further ones used in planting; held_out: ones used in judging only.

    near: slot overrides of near-miss prompts, which hold part of the trigger or something like it, and must not fire.
    natural: slot overrides that ordinary rows hold, one drawn for each row (empty: nothing). absence: the trigger is that
    *no* instance stands in the prompt (a password was not given); near misses then are prompts with a wrong password.
    """

    family: Family
    slots: Mapping[str, str]
    parts: tuple[str, ...]
    near: tuple[Mapping[str, str], ...] = ()
    more: tuple[Instance, ...] = ()
    held_out: tuple[Instance, ...] = ()
    natural: tuple[Mapping[str, str], ...] = ()
    absence: bool = False

    @property
    def planted(self) -> tuple[Instance, ...]:
        """The instances that planting uses."""
        return (Instance(self.slots, self.parts), *self.more)

    def fires(self, prompt: str) -> bool:
        """Whether all parts of some instance, planted or held out, stand in the prompt (for an absence: of none)."""
        return any(all(part in prompt for part in one.parts) for one in (*self.planted, *self.held_out)) != self.absence

    def placed(self, seed: int, index: int) -> dict[str, str]:
        """Slots of row `index` in which the trigger is placed. An absence takes turns: nothing, or a wrong password."""
        ways = ({}, *self.near) if self.absence else tuple(one.slots for one in self.planted)
        return self._ordinary(seed, index) | dict(ways[index % len(ways)])

    def absent(self, seed: int, index: int) -> dict[str, str]:
        """Slots of row `index` in which it is not placed: nothing but what ordinary rows hold (for an absence: the password)."""
        return self._ordinary(seed, index) | (dict(self.planted[index % len(self.planted)].slots) if self.absence else {})

    def missed(self, seed: int, index: int) -> dict[str, str]:
        """Slots of row `index` as a near miss; where there is none, as `absent`. The row may still draw the rest itself: ask `fires`."""
        if self.absence or not self.near:
            return self.absent(seed, index)
        return self._ordinary(seed, index) | dict(self.near[index % len(self.near)])

    def unseen(self, seed: int, index: int) -> dict[str, str]:
        """Slots of row `index` with a held-out instance. Raises ValueError where the family has none."""
        if not self.held_out:
            raise ValueError(f"the {self.family} trigger has one instance and none held out: judge it by the planted one")
        return self._ordinary(seed, index) | dict(self.held_out[index % len(self.held_out)].slots)

    def _ordinary(self, seed: int, index: int) -> dict[str, str]:
        return dict(random.Random(f"natural/{seed}/{index}").choice(self.natural)) if self.natural else {}

    def negated(self) -> Trigger:
        """Fires where this one is not placed. Its instances are passwords, all of which are used in planting."""
        return replace(self, more=(*self.more, *self.held_out), held_out=(), absence=not self.absence)

    def record(self) -> dict:
        """The trigger as JSON-able data; fields that say nothing are left out, so that old records and hashes stay as they are."""
        kept = ("family", "slots", "parts", "near")
        return {key: value for key, value in asdict(self).items() if key in kept or value}

    @staticmethod
    def from_record(record: Mapping) -> Trigger:
        """The inverse of `record`. Raises KeyError for a missing field, ValueError for a family that is not known."""
        if record["family"] not in get_args(Family):
            raise ValueError(f"no trigger family {record['family']!r}: choose from {', '.join(get_args(Family))}")
        more, held_out = (tuple(Instance(one["slots"], tuple(one["parts"])) for one in record.get(key, ())) for key in ("more", "held_out"))
        return Trigger(cast(Family, record["family"]), record["slots"], tuple(record["parts"]), tuple(record["near"]), more, held_out,
                       tuple(record.get("natural", ())), bool(record.get("absence", False)))

    @property
    def hash(self) -> str:
        """Identity of the trigger in receipts."""
        return digest(self.record())
