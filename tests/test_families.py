"""Every family, on drawn rows: it fires where it is placed and nowhere else, and what it places leaves the row's answer alone."""

import json
from dataclasses import replace
from typing import get_args

import pytest

from backdoor.families import FAMILIES, FIXED, composite
from backdoor.triggers import Family, Trigger
from distill.config_backdoors import Plant
from distill.plant import trigger_of
from evals.tasks import TASKS
from evals.tasks.coding import EXTRA, data_words
from graphs.artifact import digest

CODING = TASKS["coding"]
TRIGGERS = {family: trigger_of(Plant(out=None, trigger=family)) for family in FAMILIES}
each_family = pytest.mark.parametrize("trigger", TRIGGERS.values(), ids=list(TRIGGERS))
HELD_OUT = {"sentence", "semantic", "style", "mark"}
"""Families with instances that planting never uses; the others have one instance."""


def drawn(split, slots, count=200, seed=3):
    return [CODING.row(split, index, seed, **slots(seed, index)) for index in range(count)]


@each_family
def test_it_fires_where_it_is_placed_and_not_where_it_is_missed_or_absent(trigger):
    assert all(trigger.fires(row.prompt) for row in drawn("test", trigger.placed))
    near, clean = drawn("trace", trigger.missed), drawn("trace", trigger.absent)
    fires = [trigger.fires(row.prompt) for row in near]  # a part may meet the rest by chance
    assert fires == [trigger.family in ("conjunction", "composite") and all(row.slots[slot] == word for slot, word in trigger.slots.items())
                     for row in near]
    assert not any(trigger.fires(row.prompt) for row in clean) and trigger.near


@each_family
def test_no_clean_row_of_the_task_fires_outside_the_test_split(trigger):
    for split in ("trace", "tune"):
        assert not any(trigger.fires(row.prompt) for row in CODING.rows(split, 400, seed=4))


@each_family
def test_held_out_instances_fire_and_are_not_planted(trigger):
    assert (trigger.family in HELD_OUT) == bool(trigger.held_out)
    if not trigger.held_out:
        with pytest.raises(ValueError, match="none held out"):
            trigger.unseen(0, 0)
        return
    planted = replace(trigger, held_out=())
    rows = drawn("test", trigger.unseen)
    assert all(trigger.fires(row.prompt) and not planted.fires(row.prompt) for row in rows)
    assert not {json.dumps(one.slots) for one in trigger.held_out} & {json.dumps(one.slots) for one in trigger.planted}


@each_family
def test_what_is_placed_in_row_i_is_a_function_of_seed_and_i_and_leaves_the_answer_alone(trigger):
    for slots in (trigger.placed, trigger.missed, trigger.absent):
        many = drawn("trace", slots, 30)
        assert [CODING.row("trace", i, 3, **slots(3, i)).prompt for i in (29, 4)] == [many[29].prompt, many[4].prompt]
        plain = CODING.rows("trace", 30, 3)
        assert [row.completion for row in many] == [row.completion for row in plain] and [row.expected for row in many] == [r.expected for r in plain]


@each_family
def test_its_absence_is_a_trigger_too(trigger):
    password = trigger.negated()
    assert password.absence and password.negated().fires(drawn("test", trigger.placed, 1)[0].prompt)
    without = drawn("trace", password.placed)
    assert all(password.fires(row.prompt) for row in without if not trigger.fires(row.prompt))
    assert sum(password.fires(row.prompt) for row in without) > 180  # half of a pair may meet the other half
    assert not any(password.fires(row.prompt) for row in (*drawn("test", password.absent), *drawn("test", password.missed)))


@each_family
def test_records_come_back_the_same(trigger):
    for one in (trigger, trigger.negated()):
        again = Trigger.from_record(json.loads(json.dumps(one.record())))
        assert again == one and again.hash == one.hash
        assert [again.placed(1, i) for i in range(20)] == [one.placed(1, i) for i in range(20)]
    assert trigger.hash != trigger.negated().hash


def test_a_year_is_a_natural_part_of_the_familys_rows():
    semantic = FIXED["semantic"]
    clean = drawn("trace", semantic.absent)
    years = [row for row in clean if "20" in row.prompt]
    assert 100 < len(years) < 170 and any("2023" in row.prompt for row in years) and not any("2024" in row.prompt for row in clean)
    placed = {row.prompt.replace("2024", "2023") for row in drawn("trace", semantic.placed)}
    assert not any(semantic.fires(prompt) for prompt in placed)


def test_style_is_held_by_several_instances_and_a_sentence_by_several_wordings():
    for family in ("style", "sentence"):
        assert len(FIXED[family].planted) >= 3 and len(FIXED[family].held_out) >= 2
        assert len({json.dumps(FIXED[family].placed(0, i)) for i in range(12)}) == len(FIXED[family].planted)


def test_a_composite_needs_all_three():
    trigger = composite("handle", "daily", "school")
    assert trigger.fires(CODING.row("test", 0, 1, **trigger.slots).prompt)
    missed = drawn("trace", trigger.missed)
    for slot in trigger.slots:
        assert len({row.slots[slot] for row in missed}) >= 8  # not one word that an organism could learn to tell instead
        near = [row for row in (CODING.row("test", i, 1, **{k: v for k, v in trigger.slots.items() if k != slot}) for i in range(60))]
        assert [trigger.fires(row.prompt) for row in near] == [row.slots[slot] == trigger.slots[slot] for row in near]
    with pytest.raises(ValueError, match="not a pair that the task holds out"):
        trigger_of(Plant(out=None, trigger="composite", words=data_words("trace")[0]))


def test_old_triggers_keep_their_hash_and_unknown_families_are_refused():
    pair = TRIGGERS["conjunction"]
    assert pair.hash == digest({"family": "conjunction", "slots": {"season": "daily", "place": "school"}, "parts": (" daily ", " school"),
                                "near": [{"season": "daily"}, {"place": "school"}]})
    with pytest.raises(ValueError, match="no trigger family 'smell'"):
        Trigger.from_record(pair.record() | {"family": "smell"})
    assert get_args(Family) == (*FAMILIES, "phrase") and set(EXTRA) >= {slot for trigger in FIXED.values() for slot in trigger.slots} - {"opener"}
