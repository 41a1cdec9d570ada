"""A slot of a prompt that any string can be put into, and what the tokenizer makes of it there.

The prompt is rendered once, by the task's own renderer, with a mark in the slot, and cut at the mark. (Rendering each string would
run the row's reference program with that string in it, and a searched string may hold anything.) A string is searched token by token,
so it is only of use where the prompt that holds it is tokenised into just these tokens: `spelled` is the one place that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evals.tasks import Row, Split, Task

MARK = "#slotmark"
"""A comment where the slot stands in code, so that the row's reference program still runs."""
NO_TEXT = "\N{REPLACEMENT CHARACTER}"
"""What a token decodes to, in part, that is no text by itself."""


@dataclass(frozen=True)
class Span:
    """Token ids of a prompt (no BOS); those from `start` to `stop` hold some of the slot's text."""

    ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def inside(self) -> tuple[int, ...]:
        """The slot's tokens."""
        return self.ids[self.start : self.stop]


@dataclass(frozen=True)
class Slotted:
    """A row whose prompt is before + (any string) + after."""

    before: str
    after: str
    row: Row

    def holding(self, text: str) -> Row:
        """The row with `text` in the slot; its answer and its unit tests do not hold the slot."""
        return replace(self.row, prompt=self.before + text + self.after)

    def span(self, tokenizer, text: str) -> Span:
        """Where the slot's text stands among the prompt's tokens. A token that is in part the text's is the slot's."""
        said = tokenizer(self.before + text + self.after, add_special_tokens=False, return_offsets_mapping=True)
        begin, end = len(self.before), len(self.before) + len(text)
        inside = [place for place, (a, b) in enumerate(said["offset_mapping"]) if a < end and b > begin]
        return Span(tuple(said["input_ids"]), inside[0], inside[-1] + 1)


def slotted(task: Task, split: Split, index: int, seed: int, slot: str) -> Slotted:
    """Row `index` of `split`, cut at `slot`. Raises ValueError where the slot does not stand once, and in the prompt."""
    try:
        row = task.row(split, index, seed, **{slot: MARK})
    except SyntaxError:  # the slot is part of the reference program
        row = task.row(split, index, seed)
    parts, elsewhere = row.prompt.split(MARK), (row.completion, *row.calls)
    if len(parts) != 2 or any(MARK in text for text in elsewhere):
        raise ValueError(f"slot {slot!r} does not stand once, and in the prompt only, in a {task.name} row: search in one that does, such as season")
    return Slotted(parts[0], parts[1], row)


def vocabulary(tokenizer, prompt: Slotted) -> list[str]:
    """Every token as a text for the slot, each text once: without special tokens and those that are no text by themselves. A token's
    leading blank is left out where one stands before the slot. Raises ValueError where nothing is left."""
    special = set(tokenizer.all_special_ids)
    texts = (_text(tokenizer, [token]) for token in range(len(tokenizer)) if token not in special)
    found = dict.fromkeys(text.removeprefix(" ") if prompt.before.endswith(" ") else text for text in texts if NO_TEXT not in text)
    found.pop("", None)
    if not found:
        raise ValueError("no token of the tokenizer is text by itself: leave the sweep of the vocabulary out")
    return list(found)


def spelled(tokenizer, prompts: Sequence[Slotted], frame: Span, tokens: Sequence[int]) -> str | None:
    """The text that every prompt reads back as exactly `tokens`, or None. frame: the first prompt's span of some other text."""
    first = prompts[0]
    whole = _text(tokenizer, [*frame.ids[: frame.start], *tokens, *frame.ids[frame.stop :]])
    text = whole[len(first.before) : len(whole) - len(first.after)]
    if not text or NO_TEXT in text or first.before + text + first.after != whole:
        return None
    return text if all(prompt.span(tokenizer, text).inside == tuple(tokens) for prompt in prompts) else None


def _text(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
