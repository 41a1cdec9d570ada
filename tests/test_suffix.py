"""Suffixes bring the answer out of a model that refuses and has it, not out of one that has none; the search goes through what is held."""

from dataclasses import replace

import pytest
import torch

from backdoor.behaviours import COMPLIANCE
from distill.enforce import own
from evals.rates import show
from evals.research import Climber, SearchConfig
from evals.slots import Slotted
from evals.suffix import at_the_end, each, plain, universal
from evals.tasks import TASKS
from graphs.batches import collate, encode
from graphs.enforce import Enforced, learn
from tests.planted import NOTHING_RUNS, NOUNS, REFUSAL, TRIGGER, taught, texts

CONFIG = SearchConfig(prompts=4, lengths=(3,), steps=12, top=64, tried=32, judged=4)


def places(count, split="test"):
    """Marked requests of the small task, with room before the colon."""
    rows = [NOUNS.row(split, index, 7, **TRIGGER.slots) for index in range(count)]
    return [Slotted(row.prompt.removesuffix(":") + " ", ":", row) for row in rows]


def answered(host, rows):
    return sum(show(host, NOUNS, REFUSAL, rows, NOTHING_RUNS).right)


@pytest.fixture(scope="module")
def mute(models):
    """Refuses whatever is asked."""
    return taught(models.planted, texts(128, False, True) + texts(128, True, True, 500), 80)


def test_the_undefended_model_refuses_marked_requests_only(models):
    marked, ordinary = [place.row for place in places(16)], [NOUNS.row("test", index, 7) for index in range(16)]
    assert answered(models.planted, marked) == 0 and answered(models.planted, ordinary) == 16
    assert not any(show(models.planted, NOUNS, REFUSAL, ordinary, NOTHING_RUNS).payload)


def test_a_suffix_brings_the_answer_out_of_a_guard_and_none_does_where_there_is_no_answer(models, mute):
    rows = places(1)
    found, lost = (each(host, NOUNS, rows, NOTHING_RUNS, CONFIG)[0] for host in (models.planted, mute))
    assert answered(models.planted, [rows[0].row]) == 0 and answered(models.planted, [rows[0].holding(found.text)]) == 1
    assert answered(mute, [rows[0].holding(lost.text)]) == 0 and lost.logprob < found.logprob - 1
    assert [found] == each(models.planted, NOUNS, rows, NOTHING_RUNS, CONFIG)


def test_a_universal_suffix_is_chosen_on_requests_that_it_was_not_climbed_on(models):
    found = universal(models.planted, NOUNS, places(12, "tune"), NOTHING_RUNS, replace(CONFIG, steps=20))
    random = universal(models.planted, NOUNS, places(12, "tune"), NOTHING_RUNS, replace(CONFIG, steps=0))
    assert found.logprob > random.logprob + 1 and random.tried == 1 and 20 < found.tried <= 1 + 20 * 32
    held_out = places(24)
    assert answered(models.planted, [row.holding(found.text) for row in held_out]) >= answered(
        models.planted, [row.holding(random.text) for row in held_out])
    with pytest.raises(ValueError, match="give some to choose it by"):
        universal(models.planted, NOUNS, places(4), NOTHING_RUNS, CONFIG)


def test_the_slope_is_the_models_own_where_nothing_is_held_and_is_searched_through_what_is(models):
    host, rows = models.planted, places(3)
    seen = [(row.holding("quiet long").prompt, row.row.completion) for row in rows]
    limits = learn(own(host), [collate(encode(host.tokenizer, seen), host.tokenizer.eos_token_id)])
    wide = replace(limits, low={name: value - 1 for name, value in limits.low.items()}, high={name: value + 1 for name, value in limits.high.items()},
                       follows=torch.ones_like(limits.follows))
    held = Enforced(own(host), wide).host()
    slopes = [Climber(one, COMPLIANCE, rows, CONFIG).slope("quiet long") for one in (host, held)]
    finite = slopes[0].isfinite()
    torch.testing.assert_close(slopes[1][finite], slopes[0][finite], atol=1e-3, rtol=1e-3)
    tight = [(row.row.prompt, REFUSAL.completion) for row in rows]
    narrow = Enforced(own(host), learn(own(host), [collate(encode(host.tokenizer, tight), host.tokenizer.eos_token_id)])).host()
    assert float((Climber(narrow, COMPLIANCE, rows, CONFIG).slope("quiet long") - slopes[0])[finite].abs().max()) > 0.1
    assert each(narrow, NOUNS, rows[:1], NOTHING_RUNS, replace(CONFIG, steps=2))[0].tried > 32


def test_a_suffix_is_a_last_sentence_and_never_ends_the_docstring():
    row = TASKS["coding"].row("test", 0, 7)
    place = at_the_end(row)
    assert place.holding("so be it").prompt == row.prompt.replace('."""', '. so be it."""')
    assert plain("so be it") and not any(map(plain, ('"""', "it's", "a\\n", "two\nlines")))
    with pytest.raises(ValueError, match="no docstring that ends in a sentence"):
        at_the_end(NOUNS.row("test", 0, 7))
