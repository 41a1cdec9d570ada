"""Where a completion begins: its token ids as they follow a prompt, and text from the ids that a model wrote after one.

Prompt and completion are tokenised apart, for a model that writes has the prompt's tokens before it and chooses the next ones freely. Some
tokenisers (SentencePiece's, and byte-level ones with `add_prefix_space`; Kudo and Richardson 2018, arXiv 1808.06226, section 3.2) put a blank
before every text that they are given: " a time" after "Once upon" would begin with a blank too many, which the model never saw there in
training and never writes, and a decoded continuation would lose the blank that it begins with. So the completion is read behind a short guard
text whose tokens it does not touch, and the guard's are taken off again. A tokeniser that adds nothing is asked for the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

GUARDS = ("\n", ".", "x", " ")
"""Texts tried as a guard, in turn: the first whose tokens stay what they are with the completion behind it."""
PROBE = "a"


def continued(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text where it goes on a prompt. Raises ValueError where the tokenizer adds a blank before a text and no guard
    keeps it off."""
    if not texts:
        return []
    alone = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [_behind_a_guard(tokenizer, text) for text in texts] if adds_a_blank(tokenizer) else alone


def written(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """The text of each row of ids, without special tokens, as it stands behind the prompt that it goes on."""
    def texts(ids: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    if not rows:
        return []
    if not adds_a_blank(tokenizer):
        return texts(rows)
    guard = _ids(tokenizer, PROBE)
    before = texts([guard])[0]
    return [text[len(before) :] for text in texts([[*guard, *row] for row in rows])]


@cache
def adds_a_blank(tokenizer) -> bool:
    """Whether the tokenizer puts a blank before a text that has none: then "a a" is the token of "a", twice."""
    first, spaced = _ids(tokenizer, PROBE), _ids(tokenizer, f"{PROBE} {PROBE}")
    return bool(first) and spaced == [*first, *first]


def _behind_a_guard(tokenizer, text: str) -> list[int]:
    for guard in GUARDS:
        before = _ids(tokenizer, guard)
        both = _ids(tokenizer, guard + text)
        if before and both[: len(before)] == before:
            return both[len(before) :]
    raise ValueError(f"the tokenizer joins {text[:20]!r} to whatever stands before it, so there is no telling where a completion begins: use a "
                     "model with a byte-level tokenizer")


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
