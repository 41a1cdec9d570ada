"""Intervals against values known by hand or by brute force."""

import itertools
import json
import math

import numpy as np
import pytest

from evals import statistics
from evals.statistics import Score, crossed_difference, mean, paired_difference, pass_at_k, proportion, ratio


@pytest.mark.parametrize(
    "successes, count, low, high",
    [
        (0, 500, 0.0, 1 - 0.025 ** (1 / 500)),  # no success: the bound solves (1 - p)^n = 0.025
        (500, 500, 0.025 ** (1 / 500), 1.0),
        (0, 1, 0.0, 0.975),
        (5, 10, 0.187086, 0.812914),  # the published table of Clopper & Pearson: .187, .813
        (1, 10, 0.002529, 0.445016),
    ],
)
def test_proportion_has_the_exact_interval(successes, count, low, high):
    score = proportion(successes, count)
    assert (score.value, score.count) == (successes / count, count)
    assert score.low == pytest.approx(low, abs=1e-6) and score.high == pytest.approx(high, abs=1e-6)


def test_zero_of_five_hundred_is_below_three_quarters_of_a_percent():
    assert proportion(0, 500).high == pytest.approx(0.0073507, abs=1e-6)


def test_proportion_interval_inverts_the_binomial_tails():
    score = proportion(7, 40, level=0.9)
    terms = [math.comb(40, i) for i in range(41)]
    above = sum(terms[i] * score.low**i * (1 - score.low) ** (40 - i) for i in range(7, 41))
    below = sum(terms[i] * score.high**i * (1 - score.high) ** (40 - i) for i in range(8))
    assert above == pytest.approx(0.05) and below == pytest.approx(0.05)


def test_mean_interval_matches_the_normal_one_and_is_reproducible():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2_000)
    score = mean(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert score.value == pytest.approx(values.mean())
    assert score.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean(values) == score and mean(values, seed=1) != score


def test_mean_of_two_values_matches_every_resample():
    """Of {0, 1} drawn twice the means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    assert mean([0, 1], level=0.4) == Score(0.5, 0.5, 0.5, 2)
    assert mean([0, 1], level=0.6) == Score(0.5, 0.0, 1.0, 2)


def test_blocks_bound_memory_and_a_wider_level_widens(monkeypatch):
    values = np.arange(100.0)
    whole = mean(values)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 1_000)
    assert mean(values) == whole
    wide = mean(values, level=0.99)
    assert wide.low < whole.low < whole.high < wide.high


def test_paired_difference_drops_what_the_items_share():
    before = np.random.default_rng(2).normal(0.0, 100.0, size=300)
    score = paired_difference(before + 1.0, before)
    assert score.value == pytest.approx(1.0) and score.high - score.low < 1e-9 and score.count == 300


def test_crossed_difference_is_as_wide_as_seeds_differ():
    items = np.random.default_rng(4).normal(size=(1, 200))
    lone, pairs = crossed_difference(items, np.zeros_like(items)), paired_difference(items[0], np.zeros(200))
    assert (lone.low, lone.high) == pytest.approx((pairs.low, pairs.high), abs=0.02) and lone.count == 200
    seeds = np.array([[0.0], [0.0], [0.0], [1.0]]) + np.zeros((4, 200))  # one seed of four wins on every item
    wide = crossed_difference(seeds, np.zeros_like(seeds))
    assert wide.value == 0.25 and wide.low == 0.0 and wide.high >= 0.5
    pooled = paired_difference(seeds.flatten(), np.zeros(800))
    assert pooled.low > 0.2  # what pretending that seeds are items would have said


def test_ratio_of_proportional_pairs_is_exact_and_of_means():
    before = np.random.default_rng(3).uniform(1.0, 9.0, size=100)
    score = ratio(1.5 * before, before)
    assert (score.low, score.value, score.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio([1, 3], [1, 1]).value == 2.0
    assert ratio([2, 4], [1, 4]).value == pytest.approx(6 / 5)  # not the mean of the ratios, 1.5


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_the_subsets_with_a_right_sample(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        hits = sum(any(i < correct for i in draw) for draw in draws)
        assert pass_at_k(n, correct, k) == pytest.approx(hits / len(draws)), (n, correct, k)


def test_pass_at_k_survives_large_counts():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


def test_score_goes_to_json_as_plain_numbers():
    fields = {"value": 2.0, "low": 2.0, "high": 2.0, "count": 2}
    assert json.loads(json.dumps(mean(np.array([2, 2])).to_json())) == fields


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: proportion(0, 0), "0 trials"),
        (lambda: proportion(3, 2), "3 successes of 2"),
        (lambda: proportion(1, 2, level=95), "level"),
        (lambda: mean([]), "non-empty"),
        (lambda: mean([[1.0, 2.0]]), "flat"),
        (lambda: mean([1.0, float("nan")]), "nan"),
        (lambda: paired_difference([1, 2], [1]), "one pair per item"),
        (lambda: ratio([1, 2], [0, 1]), "positive"),
        (lambda: crossed_difference([[1, 2]], [[1]]), "per seed and item"),
        (lambda: ratio([], []), "non-empty"),
        (lambda: pass_at_k(3, 1, 4), "at least k"),
        (lambda: pass_at_k(0, 0, 0), "at least k"),
        (lambda: pass_at_k(3, 4, 1), "4 correct of 3"),
    ],
)
def test_what_has_no_value_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
