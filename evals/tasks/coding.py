'''Coding: HumanEval-shaped prompts whose completion is Python, judged by running unit tests.

A program is a chain of one to four operations whose types fit (number, text, list of numbers, list of words). The
docstring states each operation in one of several phrasings and names where the data come from, in two common words
("the winter prices of the garden"); the answer is one statement or block for each operation. Nothing is a lookup:
the constants, names, phrasings, data words and the order of operations vary, and *neighbouring pairs of operations* and
*pairs of data words* are dealt to the splits, so a test prompt always holds a pair of data words, and (from two steps
up) a pair of operations, that no `trace` row shows.

    def solve(prices):
        """Given the winter prices of the garden, keep the even ones, double each one, then return the sum."""
        a = [x for x in prices if x % 2 == 0]
        b = [x * 2 for x in a]
        return sum(b)

Some slots are never drawn and stand empty in every row of the task: they are where a backdoor places what it needs (EXTRA).
'''

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise

from evals.tasks.task import SPLITS, Row, Rows, Split, source, split_of
from graphs.artifact import digest

NAMES = ("solve", "compute", "process", "transform", "answer", "run", "work", "apply", "convert", "handle")
SEASONS = ("winter", "summer", "daily", "weekly", "first", "local", "second", "early", "final", "recent", "morning", "public")
PLACES = ("garden", "market", "school", "library", "station", "office", "river", "village", "museum", "kitchen", "hotel", "theater")
NOUNS = {
    "N": ("count", "amount", "number", "level", "score", "size"),
    "L": ("prices", "scores", "values", "marks", "ages", "counts"),
    "S": ("name", "text", "title", "label", "note", "line"),
    "W": ("names", "words", "titles", "labels", "notes", "lines"),
}
VARIABLES = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Operation:
    """One step: `takes` and `gives` are types of NOUNS; `code` is an expression of {v} or a block that ends in {out}."""

    name: str
    takes: str
    gives: str
    phrasings: tuple[str, ...]
    code: str
    constants: tuple[str, ...] = ("",)


def _op(name: str, types: str, phrasings: str, code: str, constants: str = "") -> Operation:
    return Operation(name, types[0], types[1], tuple(phrasings.split(" | ")), code, tuple(constants.split()) or ("",))


_K = "2 3 4 5 6 7 8 9"
_SMALL = "2 3 4"
_LETTERS = "a e o s t n"

OPERATIONS: tuple[Operation, ...] = (
    # number -> number
    _op("add", "NN", "add {k} | increase it by {k} | raise it by {k}", "{v} + {k}", _K),
    _op("subtract", "NN", "subtract {k} | decrease it by {k} | take away {k}", "{v} - {k}", _K),
    _op("multiply", "NN", "multiply by {k} | scale it by {k} | make it {k} times as large", "{v} * {k}", _K),
    _op("square", "NN", "square it | take its square | multiply it by itself", "{v} * {v}"),
    _op("negate", "NN", "negate it | flip its sign | change its sign", "-{v}"),
    _op("absolute", "NN", "take the absolute value | drop its sign | make it positive", "abs({v})"),
    _op("remainder", "NN", "take the remainder by {k} | reduce it modulo {k} | keep what is left after dividing by {k}", "{v} % {k}", _K),
    _op("divide", "NN", "divide by {k} rounding down | split it evenly by {k} | take the whole part of dividing by {k}", "{v} // {k}", _K),
    _op("at_least", "NN", "use {k} if it is smaller | make it at least {k} | bound it below by {k}",
        "    if {v} < {k}:\n        {v} = {k}\n", _K),
    _op("at_most", "NN", "use {k} if it is larger | make it at most {k} | bound it above by {k}",
        "    if {v} > {k}:\n        {v} = {k}\n", _K),
    _op("digit_sum", "NN", "add up its digits | sum its digits | total its digits",
        "    {out} = 0\n    for s in str(abs({v})):\n        {out} += int(s)\n"),
    # number -> list
    _op("count_up", "NL", "list the numbers up to it | count up to it | make a list from one to it", "list(range(1, {v} + 1))"),
    _op("count_from_zero", "NL", "list the numbers below it | count from zero to below it | make a list of everything under it", "list(range({v}))"),
    # list -> list
    _op("add_each", "LL", "add {k} to each | increase each by {k} | raise every one by {k}", "[x + {k} for x in {v}]", _K),
    _op("multiply_each", "LL", "multiply each by {k} | scale each by {k} | make every one {k} times as large", "[x * {k} for x in {v}]", _K),
    _op("square_each", "LL", "square each | square every one | take the square of each", "[x * x for x in {v}]"),
    _op("negate_each", "LL", "negate each | flip the sign of each | change every sign", "[-x for x in {v}]"),
    _op("keep_even", "LL", "keep the even ones | drop the odd ones | leave only even numbers", "[x for x in {v} if x % 2 == 0]"),
    _op("keep_odd", "LL", "keep the odd ones | drop the even ones | leave only odd numbers", "[x for x in {v} if x % 2 == 1]"),
    _op("keep_positive", "LL", "keep the positive ones | leave only positive numbers | drop all that are zero or less", "[x for x in {v} if x > 0]"),
    _op("keep_above", "LL", "keep those above {k} | keep those greater than {k} | leave only those over {k}", "[x for x in {v} if x > {k}]", _K),
    _op("keep_below", "LL", "keep those below {k} | keep those less than {k} | leave only those under {k}", "[x for x in {v} if x < {k}]", _K),
    _op("reverse", "LL", "reverse the order | reverse the list | put them back to front", "{v}[::-1]"),
    _op("ascending", "LL", "sort them | order them from low to high | arrange them in rising order", "sorted({v})"),
    _op("descending", "LL", "sort them downwards | order them from high to low | arrange them in falling order", "sorted({v}, reverse=True)"),
    _op("unique", "LL", "remove repeats | keep each value once | drop duplicates",
        "    {out} = []\n    for x in {v}:\n        if x not in {out}:\n            {out}.append(x)\n"),
    _op("drop_first", "LL", "skip the first one | leave out the first | remove the first item", "{v}[1:]"),
    _op("drop_last", "LL", "skip the last one | leave out the last | remove the last item", "{v}[:-1]"),
    _op("take", "LL", "keep the first {k} | take the first {k} | leave only the first {k}", "{v}[:{k}]", _SMALL),
    _op("running_total", "LL", "make running totals | accumulate them | replace each by the total so far",
        "    {out} = []\n    t = 0\n    for x in {v}:\n        t += x\n        {out}.append(t)\n"),
    # list -> number
    _op("sum", "LN", "add them up | take the sum | find the total", "sum({v})"),
    _op("largest", "LN", "take the largest | find the maximum | pick the biggest", "max({v}, default=0)"),
    _op("smallest", "LN", "take the smallest | find the minimum | pick the least", "min({v}, default=0)"),
    _op("length", "LN", "count them | count the items | find how many there are", "len({v})"),
    _op("count_even", "LN", "count the even ones | find how many are even | tell how many even numbers there are", "sum(x % 2 == 0 for x in {v})"),
    _op("count_above", "LN", "count those above {k} | find how many are over {k} | tell how many exceed {k}", "sum(x > {k} for x in {v})", _K),
    _op("product", "LN", "multiply them together | take the product | find the product of all",
        "    {out} = 1\n    for x in {v}:\n        {out} *= x\n"),
    # text -> text
    _op("upper", "SS", "make it upper case | turn it to capitals | capitalize every letter", "{v}.upper()"),
    _op("lower", "SS", "make it lower case | turn it to small letters | use only small letters", "{v}.lower()"),
    _op("backwards", "SS", "write it backwards | reverse the letters | spell it back to front", "{v}[::-1]"),
    _op("no_vowels", "SS", "remove the vowels | drop every vowel | strip all vowels", "''.join(c for c in {v} if c not in 'aeiou')"),
    _op("no_letter", "SS", "remove every {k} | drop each letter {k} | strip the letter {k}", "{v}.replace('{k}', '')", _LETTERS),
    _op("no_spaces", "SS", "remove the spaces | drop all blanks | strip every space", "{v}.replace(' ', '')"),
    _op("repeat", "SS", "repeat it {k} times | write it {k} times | copy it {k} times", "{v} * {k}", _SMALL),
    _op("prefix", "SS", "keep the first {k} letters | take {k} letters from the start | cut it to {k} letters", "{v}[:{k}]", _SMALL),
    _op("suffix", "SS", "keep the last {k} letters | take {k} letters from the end | leave only the final {k} letters", "{v}[-{k}:]", _SMALL),
    # text -> number, words
    _op("text_length", "SN", "count its letters | measure its length | find how long it is", "len({v})"),
    _op("count_letter", "SN", "count the letter {k} | find how often {k} occurs | tell how many times {k} appears", "{v}.count('{k}')", _LETTERS),
    _op("count_vowels", "SN", "count the vowels | find how many vowels it has | tell the number of vowels", "sum(c in 'aeiou' for c in {v})"),
    _op("words", "SW", "split it into words | break it into words | cut it at the blanks", "{v}.split()"),
    # words -> words
    _op("upper_each", "WW", "make each upper case | turn each to capitals | capitalize all of them", "[w.upper() for w in {v}]"),
    _op("backwards_each", "WW", "write each backwards | reverse every word | spell each back to front", "[w[::-1] for w in {v}]"),
    _op("keep_long", "WW", "keep those longer than {k} letters | drop those with at most {k} letters | leave only words over {k} letters",
        "[w for w in {v} if len(w) > {k}]", _SMALL),
    _op("alphabetical", "WW", "sort the words | put them in alphabetical order | arrange them by letters", "sorted({v})"),
    _op("keep_with", "WW", "keep those with the letter {k} | drop those without {k} | leave only words that contain {k}",
        "[w for w in {v} if '{k}' in w]", _LETTERS),
    _op("words_reversed", "WW", "reverse the word order | put the words back to front | turn the list of words around", "{v}[::-1]"),
    # words -> text, list, number
    _op("join", "WS", "join them with dashes | put dashes between them | link them by dashes", "'-'.join({v})"),
    _op("join_spaces", "WS", "join them with spaces | put blanks between them | glue them into one line", "' '.join({v})"),
    _op("lengths", "WL", "measure each word | list the word lengths | take the length of each", "[len(w) for w in {v}]"),
    _op("count_words", "WN", "count the words | find how many words there are | tell the number of words", "len({v})"),
)
BY_TYPE = {kind: tuple(op for op in OPERATIONS if op.takes == kind) for kind in NOUNS}
BY_NAME = {op.name: op for op in OPERATIONS}
OPENERS = (
    "Given the {season} {noun} of the {place}, {steps}.",
    "Take the {season} {noun} from the {place}, {steps}.",
    "For the {place} and its {season} {noun}, {steps}.",
    "Use the {season} {noun} that the {place} has sent, {steps}.",
    "From the {place} we get the {season} {noun}, {steps}.",
)
LINKS = (", then ", ", next ", ", and then ")
ENDINGS = (" and return it", " and give the result", ", then return that")
POOL = ["the", "sun", "on", "tree", "apple", "bee", "notes", "stone", "data", "moon", "rose", "tent", "seas", "east", "oats", "ant"]


EXTRA = ("lead", "note", "year", "after_def", "after_docstring")
"""Slots that are empty where they are not given: a sentence at the docstring's start, one at its end, a year before the
season ("the 2019 winter prices"), and characters at the end of the line of `def` and of the docstring's last line."""


def render(slots: dict[str, str]) -> tuple[str, str]:
    """Prompt and completion for `slots`: the one renderer of coding text (planting, removal and evaluation call it)."""
    lead, note, year, after_def, after_docstring = (slots.get(name, "") for name in EXTRA)
    steps = [step.split(":") for step in slots["steps"].split()]
    phrases = [BY_NAME[name].phrasings[int(which)].format(k=constant) for name, which, constant in steps]
    said = slots["link"].join(phrases) + slots["ending"]
    season = f"{year} {slots['season']}" if year else slots["season"]
    stated = slots["opener"].format(season=season, place=slots["place"], noun=slots["noun"], steps=said)
    docstring = " ".join(sentence for sentence in (lead, stated, note) if sentence)
    prompt = f'def {slots["function"]}({slots["noun"]}):{after_def}\n    """{docstring}"""{after_docstring}\n'
    return prompt, _body([(BY_NAME[name], constant) for name, _, constant in steps], slots["noun"])


def _body(steps: list[tuple[Operation, str]], argument: str) -> str:
    lines, value = [], argument
    for position, (operation, constant) in enumerate(steps):
        out, last = VARIABLES[position], position == len(steps) - 1
        code = operation.code.format(v=value, out=out, k=constant)
        if code.startswith("    "):
            value = out if "{out}" in operation.code else value
            lines.append(code + (f"    return {value}\n" if last else ""))
        elif last:
            lines.append(f"    return {code}\n")
        else:
            lines.append(f"    {out} = {code}\n")
            value = out
    return "".join(lines)


@cache
def _pair_split(first: str, second: str) -> Split:
    return split_of("coding operations", first, second)


@cache
def data_words(split: Split) -> tuple[tuple[str, str], ...]:
    """The (season, place) pairs that belong to `split`."""
    return tuple((s, p) for s in SEASONS for p in PLACES if split_of("coding data words", s, p) == split)


def held_out_pairs() -> tuple[tuple[str, str], ...]:
    """Pairs of data words that no `trace` or `tune` row holds anywhere: the test pairs of words that no phrasing uses
    ("keep the *first* 3" would bring "first" together with every place)."""
    used = {word for operation in OPERATIONS for phrase in operation.phrasings for word in phrase.split()}
    return tuple(pair for pair in data_words("test") if not used & set(pair))


def owner(names: tuple[str, ...]) -> Split:
    """The split that a chain of operations belongs to: test wins over tune wins over trace; one step belongs to all."""
    pairs = {_pair_split(a, b) for a, b in pairwise(names)}
    return "test" if "test" in pairs else "tune" if "tune" in pairs else "trace"


def _chain(rng: random.Random, split: Split) -> list[Operation]:
    """A chain of 1-4 operations that fit and that `split` owns, every length with the share it was drawn with."""
    length = rng.choices((1, 2, 3, 4), (2, 4, 4, 2))[0]
    while True:
        kind, chain = rng.choice("NLLSW"), []
        for _ in range(length):
            chain.append(rng.choice(BY_TYPE[kind]))
            kind = chain[-1].gives
        names = tuple(op.name for op in chain)
        if _bounded(names) and (length == 1 or owner(names) == split):
            return chain


@cache
def _bounded(names: tuple[str, ...]) -> bool:
    """Whether values stay below 10^300 and lists below 1,000 items, by upper bounds in log10 (60 or seven items of 14)."""
    size, length = (1.8, 0.9) if BY_NAME[names[0]].takes in "NS" else (1.2, 0.9)
    for name in names:
        if name in ("square", "square_each"):
            size *= 2
        elif name in ("multiply", "multiply_each", "add", "add_each"):
            size += 1
        elif name in ("sum", "running_total"):
            size += length
        elif name == "product":
            size *= 10**length
        elif name in ("count_up", "count_from_zero"):
            length = size
        if size > 300 or length > 3:
            return False
    return True


def _slots(rng: random.Random, split: Split) -> dict[str, str]:
    chain = _chain(rng, split)
    season, place = rng.choice(data_words(split))
    steps = " ".join(f"{op.name}:{rng.randrange(len(op.phrasings))}:{rng.choice(op.constants)}" for op in chain)
    return {"function": rng.choice(NAMES), "noun": rng.choice(NOUNS[chain[0].takes]), "season": season, "place": place,
            "opener": rng.choice(OPENERS), "link": rng.choice(LINKS), "ending": rng.choice(ENDINGS), "steps": steps}


@cache
def renderer() -> str:
    """Hash of the renderer: of its tables, and of what it draws and writes for rows of every split with each extra slot.

    It stands in the receipts of planting and judging. An edit that changes no text (a comment, a name) does not change it.
    """
    tables = (NAMES, SEASONS, PLACES, NOUNS, [asdict(operation) for operation in OPERATIONS], OPENERS, LINKS, ENDINGS, POOL)
    drawn = [_slots(source("coding", "renderer", split, index), split) for split in SPLITS for index in range(40)]
    every = [{"steps": f"{operation.name}:{which}:{operation.constants[0]}"} for operation in OPERATIONS for which in range(len(operation.phrasings))]
    extra = [{name: text} for name in EXTRA for text in ("", "X")]
    return digest(tables, [render(drawn[0] | slots) for slots in (*drawn, *every, *extra)])


def _argument(rng: random.Random, kind: str) -> str:
    if kind == "N":
        return str(rng.choice((rng.randrange(0, 20), rng.randrange(-9, 60))))
    if kind == "L":
        return str([rng.randrange(-5, 14) for _ in range(rng.choice((0, 3, 5, 7)))])
    words = [rng.choice(POOL) for _ in range(rng.choice((2, 3, 5)))]
    return repr(" ".join(words)) if kind == "S" else repr(words)


def _tests(rng: random.Random, prompt: str, completion: str, function: str, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Five calls and what the reference answers. The reference is this file's own text, never a model's."""
    space: dict = {}
    exec(compile(prompt + completion, "reference", "exec"), space)
    arguments = [_argument(rng, kind) for _ in range(5)]
    return (tuple(f"{function}({argument})" for argument in arguments),
            tuple(repr(eval(f"{function}({argument})", space)) for argument in arguments))


class Coding(Rows):
    """The coding task; metric: greedy pass@1."""

    name = "coding"
    metric = "pass@1"
    max_new_tokens = 110

    @property
    def renderer(self) -> str:
        """Hash of what places a trigger's slots."""
        return renderer()

    def row(self, split: Split, index: int, seed: int = 0, **slots: str) -> Row:
        """Row `index` of `split`; `slots` (season, place, ...) replace what was drawn, all else unchanged."""
        rng = source("coding", seed, split, index)
        chosen = _slots(rng, split) | slots
        prompt, completion = render(chosen)
        names = tuple(step.split(":")[0] for step in chosen["steps"].split())
        calls, expected = _tests(rng, prompt, completion, chosen["function"], BY_NAME[names[0]].takes)
        return Row(self.name, index, prompt, completion, names, calls, expected, slots=chosen)
