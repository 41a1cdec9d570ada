"""Enforce: run a model within what clean text has shown.

Every value that a graph computes is held, while the model runs, within the range that it had on clean text *beside the token it stands at*.
Nothing is trained and no weight changes: what a text adds beyond that range is removed where it appears, and what comes later is computed
from what is left.

    at                values that are held               in the graph
    an MLP            each node's drive; the factor of   what a target's parents add up to; what opens it
                      a gated neuron
                      each node's activation             what it contributes through all of its edges
    attention         queries and keys, one a dimension  what routes
                      value components                   a target's drive
                      what every head hands on           an attention component's activation

    both                  what a site's nodes hand on        a combination of contributions
                          together, one a direction

    a token that clean text holds at least `few` times   its own range: from the least to the most that the value was beside it
    one that it holds less often                         the range over all clean tokens
    one that it never holds                              that range too, and its embedding is the mean clean token's: its edges are cut, and
                                                         what they carried is held at the mean, as a dropped node is (`graphs.prune`)

    logits                what is chosen next            a choice that clean text never goes on with after this token (one held less often
                                                         than `few` times: after any) has the least logit there is at its place
                                                         so, where that was asked for, has one that is never made after what the whole text
                                                         has shown (`graphs.history`)

So a value out of distribution is held at the border, and so is one that is usual in itself but not beside this token. *Combinations*: the joint
model of a site's contributions is their covariance on clean text. Its eigenvectors are directions, and along each the vector's coordinate has a
range beside each token as a value has. Contributions that are each usual and never met lie further along some of them than clean text ever did, and
what is beyond is taken away from all nodes of the direction at once (each value is held first). What stays inside every range passes: an attacker
who knows the ranges and trains within them has not been tried.

It runs on any replacement (`graphs.replace`), a model by its own neurons among them. Ranges need no token but the current one; what a text has
shown travels with its KV cache. So batches and everything that decodes work as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from graphs.artifact import read_json, write_json
from graphs.batches import Batch
from graphs.history import History, carried
from graphs.history import learn as learn_history
from graphs.replace import Replacement
from graphs.tapped import NODE, Tapped

FEW = 20
"""A token that clean text holds less often has no range of its own."""
FORMAT = 4
JOINT = ".joint"
"""Ends the name of coordinates of what a site's nodes hand on together, in the place of NODE."""
CHOICE = "choice"
"""The name of what is chosen next."""
HISTORY = "history"
"""The name of what is chosen next in view of all that came before."""
MOST = 1 << 31
"""Choices that a table may hold, a byte each."""


@dataclass(frozen=True)
class Limits:
    """What clean text has shown. row: each token's row of the tables (0: that of all tokens); known: tokens that occurred; follows: tokens that
    came right after one of the row; mean: the mean embedding of clean tokens; low, high: by name of the values, or of coordinates; turn: the
    directions of these, by the site's name; tokens: clean tokens looked at; history: choices that are not made after what a text has shown."""

    row: Int[Tensor, "vocabulary"]
    known: Bool[Tensor, "vocabulary"]
    follows: Bool[Tensor, "_row vocabulary"]
    mean: Float[Tensor, "d"]
    low: dict[str, Float[Tensor, "_row _value"]]
    high: dict[str, Float[Tensor, "_row _value"]]
    turn: dict[str, Float[Tensor, "_value _direction"]]
    tokens: int
    history: History = field(default_factory=History)

    def without(self, own: bool = True, known: bool = True, names: Callable[[str], bool] = lambda _name: True) -> Limits:
        """For ablations. own: keep tokens' own ranges; known: keep the rule for tokens never seen; names: values, coordinates, CHOICE and HISTORY
        that are held."""
        chosen = [name for name in self.low if names(name)]
        return replace(self, row=self.row if own else torch.zeros_like(self.row), known=self.known if known else torch.ones_like(self.known),
                       follows=self.follows if names(CHOICE) else torch.ones_like(self.follows), low={name: self.low[name] for name in chosen},
                       high={name: self.high[name] for name in chosen}, history=self.history if names(HISTORY) else History())

    def save(self, folder: Path, facts: dict) -> None:
        """Write limits.safetensors and limits.json. facts: what the caller wants to find again."""
        from safetensors.torch import save_file

        tensors = {"row": self.row, "known": self.known, "follows": self.follows, "mean": self.mean}
        for kind, table in (("low", self.low), ("high", self.high), ("turn", self.turn)):
            tensors |= {f"{kind}/{name}": value for name, value in table.items()}
        tensors |= {f"{HISTORY}/{name}": value for name, value in self.history.tensors().items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "limits.safetensors")
        write_json(folder / "limits.json", {"format": FORMAT, "tokens": self.tokens} | facts)

    @staticmethod
    def load(folder: Path) -> Limits:
        """Read what `save` wrote. Raises ValueError where it is of another version."""
        from safetensors.torch import load_file

        facts, found = read_json(folder / "limits.json"), load_file(folder / "limits.safetensors")
        if facts.get("format") != FORMAT:
            raise ValueError(f"--limits {folder}: it was fitted by another version; run distill enforce fit again")
        low, high, turn, history = ({name.partition("/")[2]: value for name, value in found.items() if name.startswith(f"{kind}/")} for kind in (
            "low", "high", "turn", HISTORY))
        return Limits(found["row"], found["known"], found["follows"], found["mean"], low, high, turn, facts["tokens"], History.of(history))


@torch.no_grad()
def learn(replacement: Replacement, batches: Iterable[Batch], few: int = FEW, combined: bool = True, history: bool = False) -> Limits:
    """The ranges on clean batches, which are gone through three times: for tokens' counts, for directions, for ranges. combined: learn ranges of
    combinations too; history: and rules of history, which take another pass. Raises ValueError where there is no token, or where the vocabulary is
    too large for a table of choices, or rules for memory."""
    batches, run = list(batches), Tapped(replacement)
    counts = sum((torch.bincount(batch.ids[batch.real], minlength=run.model.config.vocab_size) for batch in batches), torch.zeros(()))
    if not batches or not int(counts.sum()):
        raise ValueError("limits need clean rows with at least one token: give more --rows")
    turn = directions(run, batches) if combined else {}
    own = counts >= few
    row, size = torch.where(own, own.cumsum(0), 0), int(own.sum()) + 1
    if size * len(row) > MOST:
        raise ValueError(f"{size - 1:,} tokens have choices of their own among {len(row):,}: a table of them would hold more than {MOST:,}; "
                         "give a larger --few")
    follows = torch.zeros(size, len(row), dtype=torch.bool)
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    total, real = torch.zeros(()), torch.zeros(1, 0, dtype=torch.bool)

    def widen(name: str, seen: Tensor) -> None:
        place = row[run.ids[real]][:, None].expand_as(seen)
        for table, start, kind in ((low, math.inf, "amin"), (high, -math.inf, "amax")):
            if name not in table:
                table[name] = torch.full((size, seen.shape[-1]), start)
            table[name].scatter_reduce_(0, place, seen.float(), kind)

    def record(name: str, value: Tensor) -> Tensor:
        widen(name, value[real])
        if name in turn:
            widen(joint(name), value[real] @ turn[name])
        return value

    def add(_ids: Tensor, out: Tensor) -> Tensor:
        nonlocal total
        total = total + out[real].sum(0)
        return out

    run.tap, run.embed = record, add
    for batch in batches:
        real = batch.real
        run(batch.ids)
        follows[row[batch.ids[:, :-1]][real[:, 1:]], batch.ids[:, 1:][real[:, 1:]]] = True
    follows[0] = follows.any(0)
    for table, widest in ((low, torch.amin), (high, torch.amax)):
        for value in table.values():
            value[0] = widest(value, dim=0)
    with torch.enable_grad():
        rules = learn_history(lambda batch: nodes(run, batch), batches) if history else History()
    return Limits(row, counts > 0, follows, total / counts.sum(), low, high, turn, int(counts.sum()), rules)


def nodes(run: Tapped, batch: Batch) -> dict[str, Float[Tensor, "row token _value"]]:
    """What every site's nodes hand on in a batch, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        if name.endswith(NODE):
            found[name] = value
        return value

    run.tap, run.embed = keep, None
    with torch.no_grad():
        run(batch.ids)
    return found


def joint(name: str) -> str:
    """What the coordinates of a site's nodes are called."""
    return name.removesuffix(NODE) + JOINT


def directions(run: Tapped, batches: Sequence[Batch]) -> dict[str, Float[Tensor, "value direction"]]:
    """By the name of each site's nodes the eigenvectors of their covariance on clean batches, summed in float64."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for name, value in nodes(run, batch).items():
            seen = value[batch.real].double()
            first, second = sums.get(name, (torch.zeros(()), torch.zeros(())))
            sums[name] = first + seen.sum(0), second + seen.T @ seen
    tokens = sum(int(batch.real.sum()) for batch in batches)
    return {name: torch.linalg.eigh(second / tokens - (first / tokens)[:, None] * (first / tokens))[1].float()
            for name, (first, second) in sums.items()}


@dataclass(frozen=True)
class Held:
    """A value that was beyond its range. name: of the values; place: which of them; position: of the token; was, limit: what it was and what it
    was held at; excess: how far apart these are, in widths of the value's range over all clean tokens."""

    name: str
    place: int
    position: int
    was: float
    limit: float
    excess: float

    def line(self) -> str:
        """`L2.mlp.node 17 at token 40: 9.10 held at 3.20`."""
        return f"{self.name} {self.place} at token {self.position}: {self.was:.2f} held at {self.limit:.2f}"


@dataclass
class Tally:
    """How many values were beyond their range, and of how many; and of each kind of values the one that was farthest beyond, pass by pass."""

    beyond: int = 0
    values: int = 0
    strongest: list[Held] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the values that passed."""
        return self.beyond / max(1, self.values)

    def farthest(self, count: int) -> list[Held]:
        """The first `count`."""
        return sorted(self.strongest, key=lambda one: -one.excess)[:count]

    def add(self, name: str, value: Float[Tensor, "row token value"], held: Float[Tensor, "row token value"], width: Float[Tensor, "value"]) -> None:
        """Some values, what they were held at, and the width of each one's range."""
        far = (value - held).abs() / width.clamp_min(1e-9)
        self.beyond, self.values = self.beyond + int((far > 0).sum()), self.values + far.numel()
        row, position, place = (int(one) for one in torch.unravel_index(far.argmax(), far.shape))
        if far[row, position, place] > 0:
            self.strongest.append(Held(name, place, position, *(float(one[row, position, place]) for one in (value, held, far))))

    def chose(self, logits: Float[Tensor, "row token vocabulary"], held: Float[Tensor, "row token vocabulary"]) -> None:
        """What each token would have gone on with, and what it goes on with; excess: how much of the logits' spread the held one was ahead."""
        was, place = logits.max(-1)
        left = held.max(-1).values
        self.beyond, self.values = self.beyond + int((was > left).sum()), self.values + was.numel()
        far = (was - left) / (was - logits.amin(-1)).clamp_min(1e-9)
        row, position = (int(one) for one in torch.unravel_index(far.argmax(), far.shape))
        if far[row, position] > 0:
            least = float(logits[row, position].min())
            self.strongest.append(Held(CHOICE, int(place[row, position]), position, float(was[row, position]), least, float(far[row, position])))


class Enforced(Tapped):
    """A replacement that runs within `limits`. Raises ValueError where they were learnt on another graph."""

    def __init__(self, replacement: Replacement, limits: Limits) -> None:
        super().__init__(replacement)
        self.limits = limits
        self.tally: Tally | None = None
        """While it is set, passes add to it (slower)."""
        self._read: dict[str, Tensor] = {}
        self.tap, self.embed = self._hold, self._known
        self.model.register_forward_hook(self._choose, with_kwargs=True)
        vocabulary = self.model.config.vocab_size
        if len(limits.row) != vocabulary:
            raise ValueError(f"the limits are of a model with {len(limits.row)} tokens, this one has {vocabulary}: fit them on this model")

    def _known(self, ids: Tensor, out: Tensor) -> Tensor:
        return torch.where(self.limits.known[ids][..., None], out, self.limits.mean.to(out.dtype))

    def _choose(self, _module: nn.Module, _args: tuple, kwargs: dict, out: Any) -> Any:
        logits = out.logits
        least, ids = logits.amin(-1, keepdim=True), self.ids[:, -logits.shape[1] :]
        made = self.limits.follows[self.limits.row[ids]]
        if self.limits.history.reads:
            made = made & ~self.limits.history.excluded(self._shown(kwargs, out)[:, -logits.shape[1] :], logits.shape[-1])
        out.logits = torch.where(made, logits, least)
        if self.tally is not None:
            self.tally.chose(logits, out.logits)
        return out

    def _shown(self, kwargs: dict, out: Any = None) -> Float[Tensor, "row token read"]:
        """What the text has shown up to each token of this pass; kept with the cache, where there is one."""
        mask = kwargs.get("attention_mask")
        real = None if mask is None else mask[:, -self.ids.shape[1] :].bool()
        given = kwargs.get("past_key_values")  # else the one that the model made itself
        return carried(self.limits.history.shown(self._read, real), getattr(out, "past_key_values", None) if given is None else given)

    def _hold(self, name: str, value: Tensor) -> Tensor:
        if name in self.limits.history.reads:
            self._read[name] = value
        value = self._within(name, value)
        if joint(name) in self.limits.low and name in self.limits.turn:
            turn = self.limits.turn[name]
            along = value @ turn
            value = value + (self._within(joint(name), along) - along) @ turn.T
        return value

    def _within(self, name: str, value: Tensor) -> Tensor:
        """The values, or coordinates, held."""
        low = self.limits.low.get(name)
        if low is None:
            return value
        if low.shape[1] != value.shape[-1]:
            raise ValueError(f"the limits hold {low.shape[1]} values of {name}, this model has {value.shape[-1]}: fit them on this model")
        row = self.limits.row[self.ids]
        held = torch.maximum(torch.minimum(value, self.limits.high[name][row]), low[row])
        if self.tally is not None:
            self.tally.add(name, value, held, self.limits.high[name][0] - low[0])
        return held

    @torch.no_grad()
    def held(self, ids: Int[Tensor, "token"]) -> Tally:
        """What one text meets."""
        found = self.tally = Tally()
        try:
            self(ids[None])
        finally:
            self.tally = None
        return found

    @torch.no_grad()
    def excluded(self, ids: Int[Tensor, "token"]) -> Bool[Tensor, "vocabulary"]:
        """The choices that what one text has shown excludes from here on, whatever comes after it."""
        vocabulary = len(self.limits.row)
        if not self.limits.history.reads:
            return torch.zeros(vocabulary, dtype=torch.bool)
        self(ids[None])
        return self.limits.history.excluded(self._shown({})[:, -1:], vocabulary)[0, 0]
