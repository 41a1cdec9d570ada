"""Interventions on the running model: holding is what it says, holding nothing is nothing, slopes are slopes."""

import pytest
import torch

from graphs.architectures import neurons, post_norm, value_output
from graphs.components import of_attention
from graphs.edges import Reconstruction, activations
from graphs.intervene import Held, gradients, run
from graphs.replace import from_noise
from graphs.trace import trace
from tests.test_edges import neuron_basis, prompt, random_basis, tiny


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "PhiForCausalLM", "OPTForCausalLM", "Gemma2ForCausalLM"])
@torch.no_grad()
def test_holding_nothing_changes_nothing_and_holding_moves_logits(name):
    host = tiny(name)
    subject = Reconstruction(host, random_basis(host))
    plain = host.model(input_ids=prompt()).logits
    assert torch.allclose(run(subject, prompt(), {}), plain, atol=1e-5)
    site = host.sites[1]
    held = {site.name: Held(torch.tensor([0, 3]), torch.tensor([5.0, -5.0]))}
    assert not torch.allclose(run(subject, prompt(), held), plain, atol=1e-2)


@torch.no_grad()
def test_a_neuron_held_is_a_neuron_with_that_value():
    host = tiny("GPT2LMHeadModel")
    subject = Reconstruction(host, neuron_basis(host))
    site = host.sites[1]
    held = run(subject, prompt(), {site.name: Held(torch.tensor([7]), torch.tensor([2.5]))})
    block = host.module("transformer.h.0.mlp")
    handle = block.act.register_forward_hook(lambda _m, _a, out: torch.cat([out[..., :7], torch.full_like(out[..., 7:8], 2.5), out[..., 8:]], -1))
    try:
        wanted = host.model(input_ids=prompt()).logits
    finally:
        handle.remove()
    assert torch.allclose(held, wanted, atol=1e-4)


@torch.no_grad()
def test_a_component_held_is_a_value_dimension_of_its_head_held():
    host = tiny("LlamaForCausalLM")
    basis = {s.name: of_attention(value_output(host.model, s), post_norm(host.model, s)) if s.kind == "attention" else neuron_basis(host)[s.name]
             for s in host.sites}
    assert neurons(host.model, host.sites[1]).gate is not None
    held = run(Reconstruction(host, basis), prompt(), {"L1.attention": Held(torch.tensor([11]), torch.tensor([1.5]))})

    def hold(_module, args):
        return (torch.cat([args[0][..., :11], torch.full_like(args[0][..., 11:12], 1.5), args[0][..., 12:]], -1),)

    handle = host.module("model.layers.1.self_attn.o_proj").register_forward_pre_hook(hold)
    try:
        wanted = host.model(input_ids=prompt()).logits
    finally:
        handle.remove()
    assert torch.allclose(held, wanted, atol=1e-4)


def test_slopes_predict_small_changes():
    host = tiny("LlamaForCausalLM")
    subject = Reconstruction(host, neuron_basis(host))

    def metric(logits):
        return logits[:, -1, 4] - logits[:, -1, 5]

    value, slopes = gradients(subject, prompt(), metric)
    a = activations(subject.basis["L0.mlp"], trace(host, prompt()).sites["L0.mlp"])[0, :, 9]
    step = 1e-2
    held = {"L0.mlp": Held(torch.tensor([9]), torch.zeros(1))}
    write = subject.basis["L0.mlp"].write[9]
    guess = -float((a * (slopes["L0.mlp"][0] @ write)).sum())
    real = float(metric(run(subject, prompt(), held)) - value)
    assert guess == pytest.approx(real, abs=0.3 * abs(real) + step)


@torch.no_grad()
def test_a_stand_ins_components_are_routed_by_its_own_pattern(tiny_host):
    replacement = from_noise(tiny_host, 8, 0)
    stand_ins = {site.name: replacement.part(site) for site in replacement.sites if site.kind == "attention"}
    subject, ids = Reconstruction(tiny_host, replacement.basis(), stand_ins), torch.randint(3, 500, (2, 6))
    a = activations(subject.basis["L0.attention"], subject.trace(ids).sites["L0.attention"])
    same = run(subject, ids, {"L0.attention": Held(torch.tensor([3]), a[0, 0, 3][None])})
    assert not torch.allclose(same, tiny_host.model(input_ids=ids).logits, atol=1e-4)
