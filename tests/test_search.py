"""Which circuit is kept: the rungs tried, their order, and when the search stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill import config
from distill.job import gate_settings, prepare
from distill.search import Healed, Search, Tuner, ratio
from evals.tasks import TASKS
from graphs.host import load
from graphs.prune import PruneConfig
from graphs.replace import from_noise


@pytest.fixture
def search(tiny_model_folder, tmp_path):
    texts = [(row.prompt, row.completion) for row in TASKS["coding"].rows("trace", 24, seed=3)]
    verb = config.Prune(model=str(tiny_model_folder), out=tmp_path, features=96, batch=8, keep=0.9)
    job = prepare(tiny_model_folder, texts, [TASKS["coding"]], verb)
    whole = from_noise(load(tiny_model_folder), 96, 0)
    order = {name: torch.arange(float(count)) for name, count in whole.node_counts().items()}
    return Search(job, verb, whole, order, Tuner({}, [], None, {}), [], tmp_path / "state")


def scripted(search: Search, passing: set[int], monkeypatch, still: float = 1.0) -> list[tuple[int, int]]:
    """Let rungs of these widths pass, without training; returns the (features, batches) of what is healed, as it happens."""
    seen = []

    def heal(self, size, kept, circuit, steps, before, near=0.0):
        seen.append((size.features, steps))
        self.tried.append({"share": size.share, "features": size.features})
        return Healed(size, kept, circuit, {}, 1.0 if size.features in passing else 0.0, still, [],
                      {"pruned": float(size.features), "healed": 0.0})

    monkeypatch.setattr(Search, "heal", heal)
    return seen


def test_a_first_rung_that_passes_is_pruned_further_until_one_fails(search, monkeypatch):
    seen = scripted(search, {48, 32}, monkeypatch)
    chosen = search.run()
    assert chosen.size.features == 32 and chosen.kl == {"first_pruned": 48.0, "first_healed": 0.0, "pruned": 32.0, "healed": 0.0}
    assert [features for features, _ in seen] == [48, 32, 16]
    assert seen[1][1] == seen[2][1] == pytest.approx(seen[0][1] / 3, abs=1) and seen[0][1] > 100
    assert [entry["chosen"] for entry in search.tried] == [False, True, False]


def test_right_answers_that_were_lost_are_not_made_up_for_by_new_ones(search, monkeypatch):
    seen = scripted(search, {48, 32, 16}, monkeypatch, still=0.89)
    assert search.run().size.features == 48 and len(seen) == 2  # a smaller rung was tried and refused


def test_a_first_rung_that_fails_is_followed_by_larger_ones_and_none_smaller(search, monkeypatch):
    seen = scripted(search, {80, 96}, monkeypatch)
    assert search.run().size.features == 80
    assert [features for features, _ in seen] == [48, 64, 80]


def test_where_none_passes_the_largest_is_kept(search, monkeypatch):
    seen = scripted(search, set(), monkeypatch)
    assert search.run().size.features == 96 and len(seen) == 4


def test_a_budget_names_one_size(search, monkeypatch):
    search = replace(search, verb=replace(search.verb, keep=None, target_ratio=0.4))
    seen = scripted(search, set(), monkeypatch)
    chosen = search.run()
    assert [features for features, _ in seen] == [chosen.size.features] == [48]


def test_gates_are_drawn_to_the_size_that_a_budget_buys(search, tiny_model_folder, monkeypatch):
    scripted(search, {48}, monkeypatch)
    job = search.job
    assert job.drawn == PruneConfig.target and gate_settings(job, search.verb).target == job.drawn
    for basis in ("features", "layers"):
        verb = replace(search.verb, keep=None, target_ratio=0.4, basis=basis, target="auto")
        small = prepare(tiny_model_folder, job.texts, job.tasks, verb)
        if basis == "features":
            assert small.drawn == replace(search, job=small, verb=verb).run().size.share < job.drawn
        else:
            assert small.drawn == pytest.approx((1 / 2 * 1 / 3) ** 0.5)  # one of two layers, one of three heads
        assert gate_settings(small, verb).target == small.drawn


def test_healing_is_counted_in_tokens(search):
    data, first = search.job.data, search.trained
    for tokens in (0, 1, 2000, 9999):
        steps = search.steps(tokens)
        spent = [int(data(first + step).real.sum()) for step in range(steps)]
        assert sum(spent) >= tokens and sum(spent[:-1]) <= max(0, tokens - 1)


def test_a_circuit_is_healed_with_the_rows_answers_but_for_those_that_the_model_drew_itself(search, monkeypatch):
    """What is asked for is what is trained with."""
    weights = []
    monkeypatch.setattr("distill.search.distill", lambda *_, answers, **__: weights.append(answers) or [0.0])
    monkeypatch.setattr("distill.search.divergence_from", lambda *_: 1.0)
    monkeypatch.setattr(Tuner, "retention", lambda *_: ({"coding": (1.0, 0.0)}, 1.0))
    for changes in ({}, {"heal_answers": 0.0}, {"heal_answers": 0.3}, {"synthetic_rows": 8}):
        one = replace(search, verb=replace(search.verb, **changes))
        one.heal(one.rungs[0], {}, one.whole, 1, [])
    assert weights == [1.0, 0.0, 0.3, 0.0]


def test_the_retention_on_tune_comes_with_the_spread_of_resampled_rows():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(400, generator=generator) < 0.9
    after = torch.where(torch.rand(400, generator=generator) < 0.1, ~before, before)
    share, error = ratio(after.tolist(), before.tolist())
    draws = torch.randint(0, 400, (2000, 400), generator=generator)
    spread = (after[draws].double().mean(1) / before[draws].double().mean(1)).std()
    assert share == pytest.approx(float(after.double().mean() / before.double().mean())) and error == pytest.approx(float(spread), rel=0.1)
    assert ratio([True] * 5, [True] * 5) == (1.0, 0.0)
