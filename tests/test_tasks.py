"""Tasks: rows are functions of (seed, split, index), splits are disjoint by composition, references pass their own tests."""

import ast
import hashlib
import json

import pytest
from pyarrow.parquet import read_table

from distill.models import CLEAN_ROWS
from distill.rows import DEFENDER_SEED
from evals.tasks import TASKS, coding, named, table
from evals.tasks.coding import BY_NAME, EXTRA, NOUNS, OPERATIONS, PLACES, SEASONS, data_words, held_out_pairs, owner, render
from evals.tasks.task import Row

SPLITS = ("trace", "tune", "test")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_row_is_a_function_of_seed_split_and_index(task):
    many = task.rows("test", 30, seed=5)
    assert [task.row("test", i, seed=5) for i in (29, 3, 17)] == [many[i] for i in (29, 3, 17)]
    assert task.row("test", 3, seed=6) != many[3]
    assert len({row.prompt for row in many}) > 25


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_splits_share_no_prompt_and_no_composition_of_the_question(task):
    rows = {split: task.rows(split, 400) for split in SPLITS}
    prompts = {split: {row.prompt for row in found} for split, found in rows.items()}
    assert not prompts["trace"] & prompts["test"] and not prompts["tune"] & prompts["test"] and not prompts["trace"] & prompts["tune"]
    if task.name == "coding":  # one-step programs belong to every split; their data words do not
        owned = {split: {r.composition for r in found if len(r.composition) > 1} for split, found in rows.items()}
    else:
        owned = {split: {(r.composition[0], *sorted(r.composition[1:])) if task.name == "stories" else r.composition for r in found}
                 for split, found in rows.items()}
    assert not owned["trace"] & owned["test"] and not owned["tune"] & owned["test"]


def test_every_held_out_program_has_a_pair_of_operations_that_no_trace_row_has():
    trace = {pair for row in TASKS["coding"].rows("trace", 1500) for pair in zip(row.composition, row.composition[1:], strict=False)}
    held = [row for row in TASKS["coding"].rows("test", 300) if len(row.composition) > 1]
    assert all(set(zip(r.composition, r.composition[1:], strict=False)) - trace for r in held)
    assert all(owner(r.composition) == "test" for r in held)


def test_data_words_are_common_and_their_pairs_are_dealt_to_one_split():
    dealt = [pair for split in SPLITS for pair in data_words(split)]
    assert len(dealt) == len(set(dealt)) == len(SEASONS) * len(PLACES)
    rows = TASKS["coding"].rows("trace", 600)
    for season, place in held_out_pairs():
        together = [r for r in rows if f" {season} " in r.prompt and f" {place}" in r.prompt]
        apart = [r for r in rows if f" {season} " in r.prompt]
        assert not together and len(apart) > 10


def test_references_pass_their_own_tests_and_all_operations_occur():
    rows = TASKS["coding"].rows("trace", 800, seed=11)
    for row in rows[:200]:
        space: dict = {}
        exec(row.prompt + row.completion, space)
        assert [repr(eval(call, space)) for call in row.calls] == list(row.expected)
        ast.literal_eval(row.expected[0])
    assert {name for row in rows for name in row.composition} == set(BY_NAME)
    assert {len(row.composition) for row in rows} == {1, 2, 3, 4}


def test_every_operation_has_three_phrasings_and_is_called_for_by_its_types():
    for operation in OPERATIONS:
        assert len(set(operation.phrasings)) >= 3
        assert operation.takes in NOUNS and operation.gives in NOUNS


def test_slots_override_one_choice_and_nothing_else():
    task = TASKS["coding"]
    plain, changed = task.row("test", 8), task.row("test", 8, season="final", place="river")
    assert "final" in changed.prompt and "river" in changed.prompt
    assert (plain.completion, plain.calls, plain.expected) == (changed.completion, changed.calls, changed.expected)
    assert render(changed.slots)[0] == changed.prompt


def test_math_answers_are_right_and_operands_are_in_range():
    for row in TASKS["math"].rows("test", 200):
        kind, a, b = row.composition[0], int(row.composition[1]), int(row.composition[2])
        assert 0 <= a <= 99 and 0 <= b <= 99
        right = {"add": a + b, "subtract": a - b, "less": a < b, "more": a > b, "max": max(a, b), "min": min(a, b)}[kind]
        assert row.completion.strip() == str(right)
        for line in row.prompt.splitlines()[:-1]:
            said, answer = line.replace(":", "=").split("=")
            assert str(eval(said)) == answer


def test_math_questions_of_test_are_never_shown_solved():
    shown = {line for split in SPLITS for row in TASKS["math"].rows(split, 400) for line in row.prompt.splitlines()[:-1]}
    assert not {row.prompt.splitlines()[-1] + row.completion.strip() for row in TASKS["math"].rows("test", 400)} & shown


def test_stories_offer_a_right_and_a_wrong_end():
    rows = TASKS["stories"].rows("test", 300)
    assert all(row.foil and row.foil != row.completion for row in rows)
    assert {row.composition[0] for row in rows} == {"agreement", "owner", "pronoun"}
    plural = [row for row in rows if row.completion.startswith(" are")]
    assert plural and all(row.prompt.split()[-4 + 0:][0].endswith("s") or " " in row.prompt for row in plural)


def test_rows_survive_a_table():
    rows = TASKS["coding"].rows("tune", 5)
    assert [Row.from_record(record) for record in table(rows)] == rows


def test_unknown_tasks_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="no such task; choose from coding, math, stories"):
        named("coding,poetry")
    assert [task.name for task in named("coding,math")] == ["coding", "math"]


@pytest.mark.parametrize("name", ["math", "stories"])
def test_tasks_without_slots_say_so(name):
    with pytest.raises(ValueError, match="no slot"):
        TASKS[name].row("test", 0, season="winter")


PINNED = {"trace": "35cc51691d30124a", "tune": "4040c47b4ab1b00f", "test": "3e463d3fb9ecb463"}
"""Hashes of 100 rows of each split with seed 5: what ships was made of such rows."""


def test_rows_are_those_that_the_shipped_models_and_the_defenders_rows_were_made_of():
    task = TASKS["coding"]
    for split, pinned in PINNED.items():
        later = ("tests", "setup", "names", "number", "whole")  # fields of rows from files, empty here
        found = [row.record() for row in task.rows(split, 100, seed=5)]
        assert all([record.pop(name) for name in later] == ["", "", [], "", True] for record in found)
        records = json.dumps(found, sort_keys=True)
        assert hashlib.sha256(records.encode()).hexdigest()[:16] == pinned
    shipped = [record for record in read_table(CLEAN_ROWS).to_pylist() if record["task"] == "coding"][:200]
    assert [task.row("trace", record["index"], DEFENDER_SEED) for record in shipped] == [Row.from_record(record) for record in shipped]


def test_slots_that_are_not_given_are_empty_and_each_changes_the_prompt_only():
    plain = TASKS["coding"].row("test", 4)
    for name in EXTRA:
        changed = TASKS["coding"].row("test", 4, **{name: " "})
        assert changed.prompt != plain.prompt and (changed.completion, changed.expected) == (plain.completion, plain.expected)
        assert render(plain.slots | {name: ""}) == (plain.prompt, plain.completion)


def test_the_renderers_hash_follows_its_words_and_its_code(monkeypatch):
    coding.renderer.cache_clear()
    before = coding.renderer()
    with monkeypatch.context() as changed:
        changed.setattr(coding, "LINKS", (", then ", ", next ", ", afterwards "))
        coding.renderer.cache_clear()
        assert coding.renderer() != before
    with monkeypatch.context() as changed:
        changed.setattr(coding, "render", lambda slots: (render(slots)[0] + "\n", render(slots)[1]))
        coding.renderer.cache_clear()
        assert coding.renderer() != before
    coding.renderer.cache_clear()
    assert coding.renderer() == before
