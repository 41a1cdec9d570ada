"""Absorption: a node that the kept ones determine is dropped at no cost; on other text it stays closer to the whole than mean ablation."""

import pytest
import torch

from evals.tasks import TASKS
from graphs.absorb import absorbed, moments
from graphs.activations import record
from graphs.batches import Epochs, encode
from graphs.fit import FitConfig, fit
from graphs.losses import divergence
from graphs.replace import from_noise
from graphs.targets import Targets


@pytest.fixture
def data(tiny_host):
    rows = TASKS["coding"].rows("trace", 64, seed=1)
    return Epochs(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0)


@torch.no_grad()
def test_duplicates_are_dropped_exactly(tiny_host, data):
    made = from_noise(tiny_host, 16, 0)
    for part in made.transcoders().values():
        for copy, original in ((5, 2), (7, 3)):
            part.w_enc[copy], part.b_enc[copy] = 2 * part.w_enc[original], 2 * part.b_enc[original]
    originals = torch.tensor([i for i in range(16) if i not in (5, 7)])
    kept = {site.name: torch.arange(3) if site.kind == "attention" else originals for site in made.sites}
    before, batch = made(data(0).ids), data(0)
    exact, plain = absorbed(made, kept, moments(made, data, 4)), made.pruned(kept)
    assert (exact(batch.ids) - before)[batch.real].abs().max() < 0.02 * (plain(batch.ids) - before)[batch.real].abs().max()


def test_absorption_beats_mean_ablation_on_other_text(tiny_host, data):
    made, _ = fit(Targets(tiny_host, data), FitConfig(features=24, local_steps=30, joint_steps=10))
    kept = {site.name: torch.tensor([0, 2]) if site.kind == "attention" else torch.arange(0, 24, 2) for site in made.sites}
    batch = data(7)
    with torch.no_grad():
        target = made(batch.ids)
        good, plain = (float(divergence(m(batch.ids), target, batch, 0.1)) for m in (absorbed(made, kept, moments(made, data)), made.pruned(kept)))
    assert good < 0.9 * plain


def test_absorbed_components_are_the_best_linear_stand_in_for_the_dropped_ones(tiny_host, data):
    made = from_noise(tiny_host, 8, 0)
    kept = {site.name: torch.arange(0, 48, 3) if site.kind == "attention" else torch.arange(8) for site in made.sites}
    kept["L1.attention"] = torch.arange(0, 32, 2)  # its third head goes
    batch, found = data(0), moments(made, data, 4)
    with torch.no_grad():
        whole = made(batch.ids)
        good, plain = absorbed(made, kept, found, components=True), made.pruned(kept, components=True)
        assert good.node_counts()["L1.attention"] == 2 and good.node_counts()["L0.attention"] == 3
        lost, before = ((m(batch.ids) - whole)[batch.real].square().mean() for m in (good, plain))
    assert lost < before


def test_moments_are_those_of_the_activations(tiny_host, data):
    made = from_noise(tiny_host, 8, 0)
    found, batch = moments(made, data, 1), data(0)
    seen = record(made.host(), batch.ids)
    name = "L1.mlp"
    a = made.transcoders()[name].encode(seen.inputs[name])[batch.real]
    assert torch.allclose(found[name].mean, a.mean(0), atol=1e-4) and torch.allclose(found[name].second, a.T @ a / len(a), atol=1e-3)
