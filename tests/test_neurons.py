"""The neuron basis: a model's own MLPs without error, prunable, in their own class again; bias-free classes stay bias-free."""

import pytest
import torch

from distill.compile import compile_circuit, home, parity
from graphs.absorb import absorbed, moments
from graphs.activations import record
from graphs.architectures import ARCHITECTURES, architecture
from graphs.batches import Encoded, Epochs
from graphs.fit import distill, set_means
from graphs.host import load, save
from graphs.neurons import Neurons, read_mlp
from graphs.replace import from_noise
from graphs.targets import Targets
from tests.test_edges import TOKENS, tiny

NAMES = [name for name in ARCHITECTURES if not ARCHITECTURES[name].post]


def targets_of(host):
    """One batch of random rows, whatever the step."""
    ids = torch.randint(3, 50, (4, TOKENS), generator=torch.Generator().manual_seed(0))
    return Targets(host, Epochs([Encoded(tuple(row), 1) for row in ids.tolist()], 4, 0, 0))


@pytest.mark.parametrize("name", NAMES)
def test_neurons_are_the_mlp_and_a_kept_few_are_those_with_the_others_gates_shut(name):
    host = tiny(name)
    found = record(host, targets_of(host).batches(0).ids)
    for site in host.sites:
        if site.kind == "mlp":
            part, x = Neurons.of(host.model, site), found.inputs[site.name]
            assert torch.allclose(part(x), found.outputs[site.name], atol=1e-4)
            assert torch.allclose(part.dictionary()(x), found.outputs[site.name], atol=1e-4)
            kept = torch.tensor([1, 5, 30])
            part.gate = torch.zeros(part.features).index_fill(0, kept, 1.0)
            if part.folds:
                part.mean.uniform_()
            assert torch.allclose(part.keep(kept)(x), part(x), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_and_healed_circuit_of_neurons_is_its_own_class_again(name, tmp_path):
    host = tiny(name)
    targets, whole = targets_of(host), from_noise(tiny(name), 0, 0, basis="neurons")
    set_means(whole, targets.batches, 1)
    kept = {site.name: torch.tensor([0, 1]) if site.kind == "attention" else torch.arange(4, 20 + site.layer) for site in whole.sites}
    small = absorbed(whole, kept, moments(whole, targets.batches, 1))
    losses = distill(targets, small, 6, 5e-3, 1.0, "heal")
    compiled = compile_circuit(small)
    assert losses[-1] < losses[0] and type(compiled.model).__name__ == name == home(host.model, "auto", neurons=True)
    row = architecture(host.model)
    widths = {compiled.module(f"{row.layers}.{layer}.{row.neurons[-2]}").weight.shape for layer in range(2)}
    assert any(21 - 4 in shape for shape in widths) and len(widths) == 1  # the wider of the two layers, padded
    save(compiled, tmp_path / name, torch.float32)
    again = load(tmp_path / name)
    assert parity(small, again, targets.batches(0)) <= 1e-5
    assert {key for key in again.model.state_dict() if "bias" in key} == {key for key in host.model.state_dict() if "bias" in key}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    host = tiny("Qwen3ForCausalLM")
    part, x = Neurons.of(host.model, host.sites[1]), torch.randn(5, 32)
    part.save(tmp_path / "n", "L0.mlp")
    again = read_mlp(tmp_path / "n")
    assert torch.equal(again(x), part(x)) and not again.folds and not again.b_dec.requires_grad and again.w_gate.requires_grad


def test_neurons_have_one_home(tmp_path):
    host = tiny("LlamaForCausalLM")
    with pytest.raises(ValueError, match="neurons keep their activation"):
        home(host.model, "arcee", neurons=True)
