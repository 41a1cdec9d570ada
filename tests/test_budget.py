"""Budgets: what a circuit will cost is what its checkpoint costs, and the largest size within a budget is taken."""

import pytest
import torch

from distill import config
from distill.__main__ import main
from distill.budget import MB, affordable, cost, stored
from distill.compile import compile_circuit, legal_groups
from evals.size import parameters
from graphs.prune import family, kept_nodes
from graphs.replace import from_noise


@pytest.mark.parametrize(("target", "basis", "skip"), [("arcee", "features", 0), ("llama", "features", 2), ("own", "neurons", 0)])
def test_the_cost_is_that_of_the_compiled_model(tiny_host, target, basis, skip):
    made = from_noise(tiny_host, 48, 0, skip=skip, basis=basis)
    kept = {site.name: torch.arange(1 + site.layer) if site.kind == "attention" else torch.arange(9 + 7 * site.layer) for site in made.sites}
    small = made.pruned(kept)
    expected, real = stored(small, target), parameters(compile_circuit(small, target).model)
    assert (expected.stored, expected.embeddings, expected.bytes) == (real.stored, real.embeddings, real.bytes)


@pytest.mark.parametrize(("name", "limit"), [("target_params", 30_000), ("target_ratio", 0.5), ("target_memory", 0.35), ("target_nodes", 60)])
def test_the_largest_size_within_the_budget_is_taken(tiny_host, name, limit):
    made, whole = from_noise(tiny_host, 64, 0), parameters(tiny_host.model).stored
    order = {site: torch.rand(count) for site, count in made.node_counts().items()}
    sizes = family(made, legal_groups(tiny_host.model))
    verb = config.Prune(**{name: limit})
    costs = [cost(made.pruned(kept_nodes(order, size)), kept_nodes(order, size), verb, whole) for size in sizes]
    chosen = sizes.index(affordable(made, order, sizes, verb, whole))
    assert costs == sorted(costs, reverse=True) and costs[chosen] <= limit and (chosen == 0 or costs[chosen - 1] > limit)


def test_memory_counts_embeddings_and_float32(tiny_host):
    made = from_noise(tiny_host, 16, 0)
    size = parameters(compile_circuit(made).model)
    verb = config.Prune(target_memory=1.0)
    assert cost(made, {}, verb, 1) == pytest.approx(4 * (size.stored + size.embeddings) / MB)


def test_one_budget_at_a_time(capsys, tmp_path):
    for flags in (["--target-params", "9", "--target-nodes", "9"], ["--keep", ".9", "--target-ratio", ".5"]):
        assert main(["prune", *flags, "--out", str(tmp_path / "run")]) == 2
        assert "exclude each other" in capsys.readouterr().err
