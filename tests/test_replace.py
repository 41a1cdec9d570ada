"""The running graph: gates, physical pruning and disk agree; the host is never touched."""

import copy

import pytest
import torch

from graphs.activations import record
from graphs.replace import Replacement, from_noise
from tests.test_edges import tiny

KEPT = {"attention": torch.tensor([0, 2]), "mlp": torch.tensor([1, 3, 4, 9])}


@pytest.fixture
def replacement(tiny_host):
    made = from_noise(tiny_host, features=12, seed=0)
    for part in made.transcoders().values():
        part.mean.uniform_(generator=torch.Generator().manual_seed(1))
    return made


def ids():
    return torch.randint(2, 500, (3, 11), generator=torch.Generator().manual_seed(0))


def kept_of(replacement):
    return {site.name: KEPT[site.kind] for site in replacement.sites}


@torch.no_grad()
def test_pruning_equals_running_with_closed_gates(replacement):
    gates = {name: torch.zeros(count).index_fill(0, kept_of(replacement)[name], 1.0) for name, count in replacement.node_counts().items()}
    with replacement.gated(gates):
        closed = replacement(ids())
    small = replacement.pruned(kept_of(replacement))
    assert torch.allclose(small(ids()), closed, atol=1e-5) and not torch.allclose(closed, replacement(ids()), atol=1e-3)
    assert small.node_counts() == {site.name: len(KEPT[site.kind]) for site in replacement.sites}


@torch.no_grad()
def test_gates_are_lifted_whatever_happens(replacement):
    before = replacement(ids())
    with pytest.raises(RuntimeError), replacement.gated({name: torch.zeros(c) for name, c in replacement.node_counts().items()}):
        raise RuntimeError
    assert torch.equal(replacement(ids()), before)


@torch.no_grad()
def test_disk_keeps_a_pruned_circuit_exactly(replacement, tiny_host, tmp_path):
    small = replacement.pruned(kept_of(replacement))
    small.save(tmp_path)
    assert torch.equal(Replacement.load(tmp_path, tiny_host)(ids()), small(ids()))


def test_the_host_and_its_embeddings_are_left_alone(tiny_host):
    before = copy.deepcopy(tiny_host.model.state_dict())
    made = from_noise(tiny_host, features=12, seed=0)
    made(ids()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in tiny_host.model.state_dict().items())
    assert all(p.grad is None for p in made.model.get_input_embeddings().parameters())
    assert made.model.get_input_embeddings().weight.data_ptr() != tiny_host.model.get_input_embeddings().weight.data_ptr()


def test_refitted_attention_starts_from_noise_and_kept_attention_does_not(tiny_host):
    refit, kept = from_noise(tiny_host, 12, 0), from_noise(tiny_host, 12, 0, "kept")
    for site in tiny_host.sites:
        if site.kind == "attention":
            own = tiny_host.module(site.module).q_proj.weight
            assert torch.equal(kept.part(site).q_proj.weight, own) and not torch.equal(refit.part(site).q_proj.weight, own)
            assert not kept.part(site).q_proj.weight.requires_grad


def test_a_recording_is_what_each_site_reads_and_writes(tiny_host):
    found = record(tiny_host, ids(), logits=True)
    for site in tiny_host.sites:
        if site.kind == "mlp":
            assert torch.allclose(tiny_host.module(site.module)(found.inputs[site.name]), found.outputs[site.name], atol=1e-6)
    stream = tiny_host.model.get_input_embeddings()(ids()) + sum(found.outputs.values())
    logits = tiny_host.model.lm_head(tiny_host.model.model.norm(stream))
    assert torch.allclose(logits, found.logits, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_host.model.modules())


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM", "LlamaForCausalLM"])
def test_embeddings_and_learned_positions_are_not_trained(name):
    made = from_noise(tiny(name), 8, 0)
    trained = {key for key, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert trained and not [key for key in trained if any(part in key for part in ("wte", "wpe", "embed", "lm_head"))]
