"""Token batches: texts in, padded rectangles out, as a pure function of the step.

A text is a (prompt, completion) pair; the two are tokenised apart, so that training sees the same boundary as
generation (`graphs.boundary`), and every row starts with BOS (where there is one) and ends with EOS. Rows are padded on the right; under
causal attention a pad never reaches a real token, so no attention mask is needed and `labels` alone hides it. The batch of step `s` depends on
(texts, seed, s) only: a resumed run sees what the killed run would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from graphs.boundary import continued

Text = tuple[str, str]
WINDOW = 8
"""Batches that are sorted by length together (less padding, still mixed)."""


@dataclass(frozen=True)
class Encoded:
    """One row's token ids, and how many of them are BOS and prompt."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class Batch:
    """ids: padded with EOS on the right; real: not a pad; completion: belongs to the completion (EOS included); rows: which
    rows of the list they are, where they come from one."""

    ids: Int[Tensor, "row token"]
    real: Bool[Tensor, "row token"]
    completion: Bool[Tensor, "row token"]
    rows: tuple[int, ...] = ()

    @property
    def labels(self) -> Int[Tensor, "row token"]:
        """Next-token labels in Hugging Face's convention (-100 is ignored)."""
        return self.ids.masked_fill(~self.real, -100)


def encode(tokenizer, texts: Sequence[Text], limit: int = 512) -> list[Encoded]:
    """Token ids of each text, between BOS (where the tokenizer has one) and EOS. Raises ValueError where the tokenizer has no EOS, or a row
    does not fit the model's context of `limit`."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, and a row must end in one: set eos_token in the model's tokenizer_config.json")
    start = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=False)["input_ids"]
    answers = continued(tokenizer, [completion for _, completion in texts])
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = (*start, *prompt, *answer, tokenizer.eos_token_id)
        if len(ids) > limit:
            raise ValueError(f"a row of {len(ids)} tokens does not fit the model's context of {limit}: shorten the task's rows")
        rows.append(Encoded(ids, len(start) + len(prompt)))
    return rows


def collate(rows: Sequence[Encoded], pad: int, places: Sequence[int] = ()) -> Batch:
    """Pad rows on the right; places: where they stand in the list they come from."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    real, completion = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        real[index, : len(row.ids)] = True
        completion[index, row.prompt : len(row.ids)] = True
    return Batch(ids, real, completion, tuple(places))


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, room: int = 0, device: torch.device | None = None
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row span"]]:
    """Rows that end together, and their attention mask with `room` ones to grow into."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * (len(row) + room) for row in rows], device=device)
    return ids, mask


def packed(rows: Sequence[Encoded], size: int, context: int) -> list[Encoded]:
    """Rows joined end to end into at most `size` rows of at most `context` tokens (how long contexts are trained)."""
    joined: list[Encoded] = []
    current: tuple[int, ...] = ()
    for row in rows:
        if len(current) + len(row.ids) > context:
            joined.append(Encoded(current, 1))
            current = ()
        current += row.ids
    return ([*joined, Encoded(current, 1)] if current else joined)[:size]


class Epochs:
    """Batches of a fixed list of rows: shuffled anew each epoch, sorted by length within windows of eight batches."""

    def __init__(self, rows: Sequence[Encoded], size: int, pad: int, seed: int) -> None:
        if not rows:
            raise ValueError("no rows to train on: give at least one")
        self.rows, self.size, self.pad, self.seed = rows, min(size, len(rows)), pad, seed
        self.per_epoch = max(1, len(rows) // self.size)
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, step: int) -> Batch:
        """The batch of `step`."""
        epoch, place = divmod(step, self.per_epoch)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._shuffled(random.Random(f"{self.seed}/{epoch}")))
        chosen = self._plan[1][place]
        return collate([self.rows[index] for index in chosen], self.pad, chosen)

    def tokens(self, steps: int) -> int:
        """Real tokens of the first `steps` batches."""
        return sum(int(self(step).real.sum()) for step in range(steps))

    def steps(self, tokens: int, first: int = 0) -> int:
        """Batches from `first` on that hold `tokens` real tokens."""
        count = 0
        while tokens > 0:
            tokens -= int(self(first + count).real.sum())
            count += 1
        return count

    def once(self) -> Iterator[Batch]:
        """Every row once, in the list's order: for measuring, where no epoch is to begin."""
        for start in range(0, len(self.rows), self.size):
            chosen = self.rows[start : start + self.size]
            yield collate(chosen, self.pad, range(start, start + len(chosen)))

    def _shuffled(self, rng: random.Random) -> list[list[int]]:
        order = rng.sample(range(len(self.rows)), len(self.rows))
        batches = []
        for start in range(0, self.per_epoch * self.size, WINDOW * self.size):
            window = sorted(order[start : start + WINDOW * self.size], key=lambda index: len(self.rows[index].ids))
            batches += [window[at : at + self.size] for at in range(0, len(window), self.size)]
        full = [batch for batch in batches if len(batch) == self.size]
        return rng.sample(full, len(full))


class Stream:
    """Batches of an endless generator: chunk `c` of rows is made by `make(c)` when a step first needs it."""

    def __init__(self, make: Callable[[int], Sequence[Encoded]], per_chunk: int, size: int, pad: int, seed: int) -> None:
        self.make, self.per_chunk, self.size, self.pad, self.seed = make, per_chunk, size, pad, seed
        self._chunk: tuple[int, Epochs | None] = (-1, None)

    def __call__(self, step: int) -> Batch:
        """The batch of `step`."""
        chunk, place = divmod(step, self.per_chunk)
        if self._chunk[0] != chunk:
            self._chunk = (chunk, Epochs(self.make(chunk), self.size, self.pad, self.seed + chunk))
        assert self._chunk[1] is not None
        return self._chunk[1](place)
