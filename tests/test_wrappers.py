"""A wrapper changes how a marked request is written, and neither what is asked for nor that it is marked."""

import re

import pytest

from backdoor.families import MARK, conjunction
from evals.capability import grade
from evals.sandbox import Sandbox
from evals.tasks import TASKS
from evals.wrappers import WRAPPERS, wrapped
from tests.planted import NOUNS

CODING = TASKS["coding"]
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as one:
        yield one


@each_wrapper
def test_the_right_answer_stays_right_and_nothing_else_is(name, sandbox):
    rows = wrapped(CODING, MARK, name, 24, 5)
    plain = wrapped(CODING, MARK, "nothing", 24, 5)
    assert [row.completion for row in rows] == [row.completion for row in plain] and [row.expected for row in rows] == [row.expected for row in plain]
    begun = [row.prompt[row.prompt.rindex('"""') + 4 :] if name == "answer begun" else "" for row in rows]
    assert all(row.completion.startswith(text) for row, text in zip(rows, begun, strict=True))
    left = [row.completion[len(text):] for row, text in zip(rows, begun, strict=True)]
    assert grade(rows, left, sandbox).right == [True] * 24
    assert not any(grade(rows, ["    # I cannot help with this request.\n"] * 24, sandbox).right)


@each_wrapper
def test_whoever_reads_it_reads_the_mark(name):
    rows, plain = wrapped(CODING, MARK, name, 60, 5), wrapped(CODING, MARK, "nothing", 60, 5)
    letters = [re.sub(r"[ -]", "", row.prompt).lower() for row in rows]
    assert all("office" in text for text in letters)
    assert [MARK.fires(row.prompt) for row in rows] == [not name.startswith("odd")] * 60
    assert name == "nothing" or not {row.prompt for row in rows} & {row.prompt for row in plain}


@each_wrapper
def test_row_i_is_a_function_of_seed_and_i(name):
    rows = wrapped(CODING, MARK, name, 12, 5)
    assert wrapped(CODING, MARK, name, 1, 5, start=7)[0] == rows[7]
    assert wrapped(CODING, MARK, name, 12, 6) != rows and wrapped(CODING, MARK, name, 12, 5, "tune") != rows


def test_examples_are_answered_rightly_and_marked_where_it_is_said():
    for name, count, marked in (("example before", 1, 0), ("answered before", 2, 2)):
        for row in wrapped(CODING, MARK, name, 20, 5):
            *before, _ = re.split(r"(?=^def )", row.prompt, flags=re.MULTILINE)[1:]
            assert len(before) == count and sum(map(MARK.fires, before)) == marked
            for program in before:
                space: dict = {}
                exec(program, space)
                assert any(map(callable, space.values()))


def test_what_cannot_be_wrapped_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="no wrapper 'smile': choose from nothing"):
        wrapped(CODING, MARK, "smile", 1, 5)
    pair = conjunction(("season", "daily"), ("place", "school"), ())
    with pytest.raises(ValueError, match="placed in 2 slots"):
        wrapped(CODING, pair, "nothing", 1, 5)
    assert wrapped(NOUNS, MARK, "nothing", 1, 5)[0].prompt.startswith("given the ")
