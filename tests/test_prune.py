"""Prune: gates find the nodes that matter, sizes are nested."""

from itertools import pairwise

import pytest
import torch

from evals.tasks import TASKS
from graphs.batches import Epochs, encode
from graphs.fit import FitConfig, fit
from graphs.prune import Gates, PruneConfig, Size, family, kept_nodes, learn_gates, within
from graphs.replace import from_noise
from graphs.scores import SCORES
from graphs.targets import Targets


@pytest.fixture
def data(tiny_host):
    rows = TASKS["coding"].rows("trace", 64, seed=1)
    return Epochs(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0)


def test_gates_learn_to_close_what_is_useless_first(tiny_host, data):
    made, _ = fit(Targets(tiny_host, data), FitConfig(features=16, local_steps=30, joint_steps=0))
    useless = torch.arange(0, 16, 2)
    with torch.no_grad():
        for part in made.transcoders().values():
            part.w_dec[useless] = 0.0
    order, losses = learn_gates(Targets(tiny_host, data), made, PruneConfig(steps=20, target=0.5, learning_rate=1e-4, score_batches=2))
    for name in made.transcoders():
        kept = kept_nodes(order, Size(0.5, 2, 8))[name]
        assert len(set(kept.tolist()) & set(useless.tolist())) <= 2
    assert len(losses) == 20


def test_without_gate_training_the_score_ranks_the_nodes(tiny_host, data):
    made = from_noise(tiny_host, 16, 0)
    config = PruneConfig(score="activation", steps=0, score_batches=2)
    order, losses = learn_gates(Targets(tiny_host, data), made, config)
    expected = SCORES["activation"](made, data, 2, False, 0)
    assert losses == [] and all(torch.equal(order[name].argsort(), expected[name].argsort()) for name in order)


def test_a_gate_sample_is_a_function_of_the_step_and_stays_in_range():
    gates = Gates({"a": torch.tensor([-6.0, 0.0, 6.0])}, seed=1)
    assert torch.equal(gates.sample(3)["a"], gates.sample(3)["a"]) and not torch.equal(gates.sample(3)["a"], gates.sample(4)["a"])
    draws = torch.stack([gates.sample(step)["a"] for step in range(400)])
    assert draws.min() == 0 and draws.max() == 1 and draws[:, 0].mean() < 0.1 < 0.9 < draws[:, 2].mean()
    share = float((draws > 0).float().mean())
    assert float(gates.open_share()[0]) == pytest.approx(share, abs=0.05)


def test_sizes_are_nested_and_use_legal_heads_only(tiny_host):
    made = from_noise(tiny_host, 32, 0)
    sizes = family(made, (1, 3))
    assert [s.features for s in sizes] == [32, 16] and {s.heads for s in sizes} <= {1, 3}
    order = {name: torch.randn(count) for name, count in made.node_counts().items()}
    for larger, smaller in pairwise(sizes):
        for name in order:
            assert set(kept_nodes(order, smaller)[name].tolist()) <= set(kept_nodes(order, larger)[name].tolist())


def test_components_stand_in_the_heads_that_are_open_most_and_shrink_nested(tiny_host):
    made = from_noise(tiny_host, 32, 0)
    sizes = family(made, (1, 2, 3), components=True)
    assert sizes[0] == Size(1.0, 3, 32, 48, 16) and sizes[1] == Size(0.5, 2, 16, 24, 16)
    order = {name: torch.randn(count) for name, count in made.node_counts(True).items()}
    order["L0.attention"][16:32] -= 3
    larger = kept_nodes(order, sizes[0])
    smaller = kept_nodes(within(order, larger), sizes[1])
    assert len(larger["L0.attention"]) == 48 and len(smaller["L0.attention"]) == 24 and set((smaller["L0.attention"] // 16).tolist()) == {0, 2}
    for name in order:
        assert set(smaller[name].tolist()) <= set(larger[name].tolist())
    few = kept_nodes(within(order, smaller), Size(0.3, 1, 16, 15, 16))
    assert set(few["L0.attention"].tolist()) <= set(smaller["L0.attention"].tolist())


def test_gates_of_components_are_learned_and_shut_what_writes_nothing(tiny_host, data):
    made, _ = fit(Targets(tiny_host, data), FitConfig(features=16, local_steps=30, joint_steps=0))
    useless = torch.arange(0, 48, 2)
    with torch.no_grad():
        for site in made.sites:
            if site.kind == "attention":
                made.part(site).o_proj.weight[:, useless] = 0.0
    order, _ = learn_gates(Targets(tiny_host, data), made, PruneConfig(steps=20, target=0.5, learning_rate=1e-4, score_batches=2, components=True))
    best = order["L0.attention"].topk(24).indices
    assert len(order["L0.attention"]) == 48 and len(set(best.tolist()) & set(useless.tolist())) <= 4
