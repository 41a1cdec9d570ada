"""Views and relations: what code alone can say of a token, and of a token that looks at another.

A *view* is a plain function from the token texts of one row to one key a token ("the token and the one before it", "inside the
docstring"); a node's hypothesis is a table over the keys of a view. A *relation* is a plain function from the texts to yes or no for
each pair (token that looks, token that is looked at); a head's hypothesis is made of relations. Nothing here has seen a model: what
a key is worth is fitted elsewhere. A view at a token reads that token and earlier ones only, as the model does. They need numpy and
nothing else, because a circuit written as a program (`graphs.hypotheses.program`) holds copies of them.

The state of Python text comes from a small automaton over characters: docstring or code, what the line begins with, whether its `=`
was passed, bracket depth, indentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from graphs.batches import Batch

View = Callable[[Sequence[str]], list[str]]
Relation = Callable[[Sequence[str]], Bool[np.ndarray, "token source"]]
VIEWS: dict[str, View] = {}
RELATIONS: dict[str, Relation] = {}
STARTS = ("def", "for", "if", "return", "while", "else", "import")
"""First words of a line that make it a kind of its own."""
KEPT = re.compile(r"\b(def|for|if|in|return|while|else|sum|len|range|sorted|max|min|str|int|abs|append|join|split|upper|lower|count|replace|default|"
                  r"reverse|True)\b")
LONGEST = 40
"""Characters of a line or clause that a key holds: its end counts."""


def view(name: str) -> Callable[[View], View]:
    """Put a function into the registry."""
    def add(function: View) -> View:
        VIEWS[name] = function
        return function
    return add


def relation(name: str) -> Callable[[Relation], Relation]:
    """Put a function into the registry."""
    def add(function: Relation) -> Relation:
        RELATIONS[name] = function
        return function
    return add


@dataclass
class Automaton:
    """Where in Python text one is, after each character."""

    quotes: int = 0
    docstring: bool = False
    depth: int = 0
    indent: int = 0
    word: str = ""
    worded: bool = False
    blank: bool = True
    assigned: bool = False
    line: str = ""

    def read(self, character: str) -> None:
        """One character further."""
        self.quotes = self.quotes + 1 if character == '"' else 0
        if self.quotes == 3:
            self.docstring, self.quotes = not self.docstring, 0
            self.line = ""
        if self.docstring:
            self.line = "" if character == "," else self.line + character
            return
        if character == "\n":
            self.indent, self.word, self.worded, self.blank, self.assigned, self.line = 0, "", False, True, False, ""
            return
        self.line += character
        if character == " " and self.blank:
            self.indent += 1
            return
        self.blank = False
        if character.isalnum() or character == "_":
            self.word += "" if self.worded else character
        else:
            self.worded = True
        self.depth = max(0, self.depth + (character in "([{") - (character in ")]}"))
        self.assigned |= character == "=" and self.depth == 0

    @property
    def state(self) -> str:
        """In words."""
        if self.docstring:
            return "docstring"
        level = f"indent {min(self.indent // 4, 3)}"
        if self.blank:
            return f"line start, {level}"
        kind = self.word if self.word in STARTS else "right of =" if self.assigned else "other"
        return f"{kind}, {level}, brackets {min(self.depth, 2)}"

    @property
    def shape(self) -> str:
        """The line so far with names and numbers made alike (in a docstring: the clause so far, numbers made alike)."""
        said = re.sub(r"\d+", "0", self.line)
        if not self.docstring:
            said = re.sub(r"[A-Za-z_]\w*", lambda found: found[0] if KEPT.fullmatch(found[0]) else "n", said)
        return said[-LONGEST:]


def _after(texts: Sequence[str], said: Callable[[Automaton], str]) -> list[str]:
    """What `said` says behind each token."""
    machine, found = Automaton(), []
    for text in texts:
        for character in text:
            machine.read(character)
        found.append(said(machine))
    return found


def _grams(texts: Sequence[str], count: int) -> list[str]:
    return ["|".join(texts[max(0, at + 1 - count) : at + 1]) for at in range(len(texts))]


@view("token")
def token(texts: Sequence[str]) -> list[str]:
    """The token."""
    return list(texts)


@view("previous token")
def previous_token(texts: Sequence[str]) -> list[str]:
    """The token before."""
    return ["", *texts[:-1]]


@view("pair")
def pair(texts: Sequence[str]) -> list[str]:
    """The token and the one before."""
    return _grams(texts, 2)


@view("triple")
def triple(texts: Sequence[str]) -> list[str]:
    """The token and the two before."""
    return _grams(texts, 3)


@view("position")
def position(texts: Sequence[str]) -> list[str]:
    """Its place, in steps that grow."""
    return [str(at if at < 8 else 8 * (at // 8) if at < 64 else 32 * (at // 32)) for at in range(len(texts))]


@view("state")
def state(texts: Sequence[str]) -> list[str]:
    """The automaton's state."""
    return _after(texts, lambda machine: machine.state)


@view("state and token")
def state_and_token(texts: Sequence[str]) -> list[str]:
    """Both."""
    return [f"{one}|{text}" for one, text in zip(state(texts), texts, strict=True)]


@view("line")
def line(texts: Sequence[str]) -> list[str]:
    """The shape of the line so far, or the clause of a docstring so far."""
    return _after(texts, lambda machine: f"{machine.docstring:d}|{machine.shape}")


@view("seen before")
def seen_before(texts: Sequence[str]) -> list[str]:
    """The token, and whether it stood in this text before."""
    return [f"{text in texts[:at]:d}|{text}" for at, text in enumerate(texts)]


@view("what followed")
def what_followed(texts: Sequence[str]) -> list[str]:
    """The token that followed the last earlier occurrence of this one (what an induction head copies)."""
    last: dict[str, int] = {}
    found = []
    for at, text in enumerate(texts):
        found.append(texts[last[text] + 1] if text in last else "")
        last[text] = at
    return found


def _codes(keys: Sequence[str]) -> Int[np.ndarray, "token"]:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)


def _back(count: int) -> Int[np.ndarray, "token source"]:
    """How far back each source lies."""
    return np.arange(count)[:, None] - np.arange(count)


def _lines(texts: Sequence[str]) -> Int[np.ndarray, "token"]:
    """The line that each token stands in; a token that holds a break begins the next."""
    return np.array(["\n" in text for text in texts], dtype=bool).cumsum()


@relation("itself")
def itself(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """The token that looks."""
    return _back(len(texts)) == 0


@relation("previous")
def previous(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """The token before."""
    return _back(len(texts)) == 1


@relation("first")
def first(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """The first token of the text (where heads look that have nothing to say)."""
    return (np.arange(len(texts)) == 0)[None].repeat(len(texts), 0)


@relation("same token")
def same_token(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """Earlier occurrences of the token."""
    codes = _codes(texts)
    return (codes[:, None] == codes) & (_back(len(texts)) > 0)


@relation("after same token")
def after_same_token(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """The tokens that followed earlier occurrences of the token (induction: Olsson et al. 2022)."""
    earlier = same_token(texts)
    return np.concatenate([np.zeros((len(texts), 1), dtype=bool), earlier[:, :-1]], 1) & (_back(len(texts)) >= 0)


@relation("same line")
def same_line(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """Earlier tokens of the same line."""
    lines = _lines(texts)
    return (lines[:, None] == lines) & (_back(len(texts)) > 0)


@relation("line break")
def line_break(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """The last token that holds a line break."""
    breaks = np.array(["\n" in text for text in texts], dtype=bool)
    lines = _lines(texts)
    return breaks & (lines[:, None] == lines) & (_back(len(texts)) >= 0)


@relation("docstring")
def docstring(texts: Sequence[str]) -> Bool[np.ndarray, "token source"]:
    """Tokens of the docstring."""
    inside = np.array([one == "docstring" for one in state(texts)], dtype=bool)
    return inside & (_back(len(texts)) >= 0)


@dataclass
class Text:
    """One batch as code reads it. texts: of each row's real tokens; what views and relations say is kept once they are asked."""

    batch: Batch
    texts: list[list[str]]
    _views: dict[str, tuple[list[str], Tensor]] = field(default_factory=dict)
    _relations: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch, vocabulary: Sequence[str]) -> Text:
        """vocabulary: the text of each token id."""
        return Text(batch, [[vocabulary[one] for one in ids[real].tolist()] for ids, real in zip(batch.ids, batch.real, strict=True)])

    @cached_property
    def seen(self) -> Bool[Tensor, "row token source"]:
        """The tokens that each token sees."""
        width = self.batch.ids.shape[1]
        return torch.ones(width, width, dtype=torch.bool).tril().expand(len(self.texts), -1, -1)

    def keys(self, name: str) -> tuple[list[str], Int[Tensor, "row token"]]:
        """A view's distinct keys, and which one each token has (pads: "")."""
        if name not in self._views:
            numbers: dict[str, int] = {"": 0}
            codes = torch.zeros(self.batch.ids.shape, dtype=torch.long)
            for row, texts in enumerate(self.texts):
                codes[row, : len(texts)] = torch.tensor([numbers.setdefault(key, len(numbers)) for key in VIEWS[name](texts)])
            self._views[name] = list(numbers), codes
        return self._views[name]

    def related(self, name: str) -> Bool[Tensor, "row token source"]:
        """A relation for every pair of tokens; no pad is related to anything."""
        if name not in self._relations:
            found = torch.zeros(*self.batch.ids.shape, self.batch.ids.shape[1], dtype=torch.bool)
            for row, texts in enumerate(self.texts):
                found[row, : len(texts), : len(texts)] = torch.from_numpy(RELATIONS[name](texts))
            self._relations[name] = found
        return self._relations[name]
