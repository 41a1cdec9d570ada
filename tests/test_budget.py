"""Budgets: what a circuit will cost is what its checkpoint costs, and the largest size within a budget is taken."""

import pytest
import torch

from distill import config
from distill.__main__ import main
from distill.budget import MB, bought, cost, spent, stored
from distill.compile import compile_circuit, legal_groups
from evals.size import parameters
from graphs.prune import columns, kept_nodes, uneven
from graphs.replace import from_noise


@pytest.mark.parametrize(("target", "basis", "skip"), [("arcee", "features", 0), ("llama", "features", 2), ("own", "neurons", 0)])
def test_the_cost_is_that_of_the_compiled_model(tiny_host, target, basis, skip):
    made = from_noise(tiny_host, 48, 0, skip=skip, basis=basis)
    kept = {site.name: torch.arange(1 + site.layer) if site.kind == "attention" else torch.arange(9 + 7 * site.layer) for site in made.sites}
    small = made.pruned(kept)
    expected, real = stored(small, target), parameters(compile_circuit(small, target).model)
    assert (expected.stored, expected.embeddings, expected.bytes) == (real.stored, real.embeddings, real.bytes)


@pytest.mark.parametrize(("name", "limit"), [("target_params", 30_000), ("target_ratio", 0.5), ("target_memory", 0.25), ("target_nodes", 80)])
def test_the_budget_is_spent_on_the_best_balanced_size(tiny_host, name, limit):
    made, whole = from_noise(tiny_host, 64, 0), parameters(tiny_host.model).stored
    verb = config.Prune(**{name: limit})
    chosen = bought(made, verb, whole)
    order = {site: torch.rand(count) for site, count in made.node_counts().items()}
    kept = kept_nodes(order, chosen)
    assert spent(made, chosen, verb, whole) == cost(made.pruned(kept), kept, verb, whole) <= limit  # whichever nodes are kept
    for sizes in columns(made, legal_groups(tiny_host.model)):
        costs = [spent(made, size, verb, whole) for size in sizes]
        largest = next((size for size, price in zip(sizes, costs, strict=True) if price <= limit), None)
        assert costs == sorted(costs, reverse=True) and (largest is None or uneven(largest, made) >= uneven(chosen, made))
        assert largest is None or largest.heads != chosen.heads or largest == chosen
    inner = bought(made, config.Prune(**{name: limit * 0.8}), whole, chosen)
    assert inner.within(chosen) and inner != chosen


def test_memory_counts_embeddings_and_float32(tiny_host):
    made = from_noise(tiny_host, 16, 0)
    size = parameters(compile_circuit(made).model)
    verb = config.Prune(target_memory=1.0)
    assert cost(made, {}, verb, 1) == pytest.approx(4 * (size.stored + size.embeddings) / MB)


def test_one_budget_at_a_time(capsys, tmp_path):
    for flags in (["--target-params", "9", "--target-nodes", "9"], ["--keep", ".9", "--target-ratio", ".5"]):
        assert main(["prune", *flags, "--out", str(tmp_path / "run")]) == 2
        assert "exclude each other" in capsys.readouterr().err
