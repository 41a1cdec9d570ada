"""Interventions on the running model: holding is what it says, holding nothing is nothing, slopes are slopes."""

import pytest
import torch

from graphs.architectures import attention_components
from graphs.dictionary import Gated
from graphs.edges import Reconstruction, activations, contributions, reading
from graphs.intervene import Cut, Held, gradients, run
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
    basis = {s.name: attention_components(host.model, s) if s.kind == "attention" else neuron_basis(host)[s.name]
             for s in host.sites}
    assert isinstance(basis["L0.mlp"].parts[0].gate, Gated)
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
    write = subject.basis["L0.mlp"].writes[9]
    guess = -float((a * (slopes["L0.mlp"][0] @ write)).sum())
    real = float(metric(run(subject, prompt(), held)).detach() - value)
    assert guess == pytest.approx(real, abs=0.3 * abs(real) + step)


@torch.no_grad()
def test_a_stand_ins_components_are_routed_by_its_own_pattern(tiny_host):
    replacement = from_noise(tiny_host, 8, 0)
    stand_ins = {site.name: replacement.part(site) for site in replacement.sites if site.kind == "attention"}
    subject, ids = Reconstruction(tiny_host, replacement.basis(), stand_ins), torch.randint(3, 500, (2, 6))
    a = activations(subject.basis["L0.attention"], subject.trace(ids).sites["L0.attention"])
    same = run(subject, ids, {"L0.attention": Held(torch.tensor([3]), a[0, 0, 3][None])})
    assert not torch.allclose(same, tiny_host.model(input_ids=ids).logits, atol=1e-4)


@torch.no_grad()
def test_a_cut_edge_moves_its_target_by_the_edge_and_nothing_else():
    host = tiny("LlamaForCausalLM")
    subject = Reconstruction(host, random_basis(host))
    site, found = host.sites[3], trace(host, prompt())
    for source in ("L1.attention", "L0.mlp"):
        node = int(activations(subject.basis[source], found.sites[source])[0].abs().sum(0).argmax())
        tokens = torch.arange(prompt().shape[1])
        edge = contributions(host, subject.basis, found, reading(host, subject.basis, found, site, torch.full_like(tokens, 2), tokens))[source]
        drive = subject.basis[site.name].drive(found.sites[site.name].x)[0, :, 2]
        moved = torch.relu(drive - edge[tokens, tokens, node]) - torch.relu(drive)
        stream = found.token[0] + sum(one.y[0] for one in found.sites.values()) + moved[:, None] * subject.basis[site.name].writes[2]
        wanted = host.model.lm_head(host.model.model.norm(stream))
        logits = run(subject, prompt(), {}, [Cut((source, node), (site.name, 2), torch.tensor(0.0))])
        assert float(moved.abs().max()) > 1e-3 and torch.allclose(logits[0], wanted, atol=1e-4)


@torch.no_grad()
def test_a_cut_edge_into_a_component_is_routed_by_its_head():
    host = tiny("Qwen3ForCausalLM")
    subject, found = Reconstruction(host, neuron_basis(host)), trace(host, prompt())
    site, length = host.sites[2], prompt().shape[1]
    tokens = torch.arange(length)
    edge = contributions(host, subject.basis, found, reading(host, subject.basis, found, site, torch.full_like(tokens, 13), tokens))["L0.mlp"]
    part, seen = subject.basis["L1.attention"], found.sites["L1.attention"]
    moved = -edge[:, :, 7].sum(1)
    value = activations(part, seen)[0, :, 13] + moved

    def hold(_module, args):  # component 13 is the second dimension of the second head (width 12)
        changed = args[0].clone()
        changed[0, :, 13] = value
        return (changed,)

    handle = host.module("model.layers.1.self_attn.o_proj").register_forward_pre_hook(hold)
    try:
        wanted = host.model(input_ids=prompt()).logits
    finally:
        handle.remove()
    assert torch.allclose(run(subject, prompt(), {}, [Cut(("L0.mlp", 7), ("L1.attention", 13), torch.tensor(0.0))]), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPTNeoXForCausalLM"])
@torch.no_grad()
def test_a_node_held_at_its_own_value_changes_nothing(name):
    host = tiny(name)
    subject, ids = Reconstruction(host, random_basis(host)), prompt()[:, :1]
    found = subject.trace(ids)
    for site in host.sites:
        part = subject.basis[site.name]
        own = activations(part, found.sites[site.name])[0, 0]
        nodes = torch.arange(part.count)[:7]
        held = run(subject, ids, {site.name: Held(nodes, own[nodes])})
        assert torch.allclose(held, host.model(input_ids=ids).logits, atol=1e-4)
