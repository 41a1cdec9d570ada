"""Stories: short English with agreement and reference, judged by a cloze and by NLL.

A story is a handful of clauses about named people and things. Each row ends in one decision that the story fixes: a
verb that agrees with a subject across an attractor ("the keys near the box *are*"), a pronoun, or a name ("Anna gave
the ball to Tom. Now the ball belongs to *Tom*"). The cloze is right when the model gives the right continuation a
higher log-probability than the foil. Pairs of subject and attractor nouns, of names, and of owner and thing are dealt
to the splits.
"""

from __future__ import annotations

import random

from evals.tasks.task import Row, Rows, Split, source, split_of

WOMEN = ("Anna", "Mary", "Lily", "Emma", "Sara", "Nora")
MEN = ("Tom", "Ben", "Jack", "Paul", "Max", "Leo")
THINGS = ("ball", "book", "boat", "hat", "lamp", "key", "cup", "box", "kite", "drum")
ANIMALS = ("dog", "cat", "bird", "horse", "duck", "fox", "goat", "frog")
SPOTS = ("tree", "house", "lake", "hill", "road", "door", "wall", "bridge")
COLORS = ("red", "blue", "green", "round", "new", "small", "big", "dark")
PLACES = ("park", "forest", "town", "beach", "farm", "barn")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("looks", "look"), ("seems", "seem"))
ENDS = {"is": "very quiet", "was": "very quiet", "has": "a long story", "looks": "very nice", "seems": "a little strange"}
NEAR = ("near", "behind", "beside", "under")


def _pair(rng: random.Random, split: Split, label: str, first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, str]:
    while True:
        a, b = rng.choice(first), rng.choice(second)
        if a != b and split_of("stories", label, *sorted((a, b))) == split:
            return a, b


def _opening(rng: random.Random, name: str) -> str:
    color, thing = rng.choice(COLORS), rng.choice(THINGS)
    return rng.choice((
        f"One day {name} went to the {rng.choice(PLACES)} with a {color} {thing}.",
        f"{name} lived near the {rng.choice(PLACES)} and had a {color} {thing}.",
        f"In the {rng.choice(PLACES)} {name} found a {color} {thing}.",
    ))


def _agreement(rng: random.Random, split: Split) -> tuple[str, str, str, str, tuple[str, ...]]:
    noun, attractor = _pair(rng, split, "agreement", ANIMALS + THINGS, SPOTS)
    many, many_attractors = rng.random() < 0.5, rng.random() < 0.5
    singular, plural = rng.choice(VERBS)
    subject = _plural(noun) if many else noun
    text = f" The {subject} {rng.choice(NEAR)} the {_plural(attractor) if many_attractors else attractor}"
    right, wrong = (plural, singular) if many else (singular, plural)
    return text, f" {right}", f" {wrong}", f" {ENDS[singular]}.", ("agreement", noun, attractor)


def _owner(rng: random.Random, split: Split) -> tuple[str, str, str, str, tuple[str, ...]]:
    giver, taker = _pair(rng, split, "owner", WOMEN + MEN, WOMEN + MEN)
    thing = rng.choice(THINGS)
    if rng.random() < 0.5:
        return f" {giver} gave the {thing} to {taker}. Now the {thing} belongs to", f" {taker}", f" {giver}", ".", ("owner", giver, taker)
    return f" {giver} took the {thing} from {taker}. Now the {thing} belongs to", f" {giver}", f" {taker}", ".", ("owner", giver, taker)


def _pronoun(rng: random.Random, split: Split) -> tuple[str, str, str, str, tuple[str, ...]]:
    woman, man = _pair(rng, split, "pronoun", WOMEN, MEN)
    name, right, wrong = rng.choice(((woman, "she", "he"), (man, "he", "she")))
    other = man if name == woman else woman
    place = rng.choice(PLACES)
    text = rng.choice((
        f" {name} saw {other} and smiled because {name} liked the {place}. Then",
        f" {name} called {other} from the {place}. {name} was happy and soon"))
    return text, f" {right}", f" {wrong}", " went home.", ("pronoun", name, other)


def _plural(noun: str) -> str:
    return "foxes" if noun == "fox" else "boxes" if noun == "box" else f"{noun}s"


CLAUSES = (_agreement, _owner, _pronoun)


class Stories(Rows):
    """The stories task; metric: cloze accuracy (NLL is reported beside it)."""

    name = "stories"
    metric = "cloze accuracy"
    max_new_tokens = 4

    def row(self, split: Split, index: int, seed: int = 0, **slots: str) -> Row:
        """Row `index` of `split`. Raises ValueError on slots: a story has none."""
        if slots:
            raise ValueError(f"stories rows have no slot {next(iter(slots))!r} for a backdoor: use the coding task")
        rng = source("stories", seed, split, index)
        text = _opening(rng, rng.choice(WOMEN + MEN))
        for _ in range(rng.choice((1, 2, 3))):
            said, right, _, rest, _ = rng.choice(CLAUSES)(rng, "trace")
            text += said + right + rest
        said, right, foil, rest, composition = rng.choice(CLAUSES)(rng, split)
        return Row(self.name, index, text + said, right + rest, composition, foil=foil + rest)
