"""Attention nodes: dropping a group equals silencing it, with and without grouped queries and biases."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from graphs.architectures import ARCHITECTURES, install
from graphs.attention import GroupGate, groups, keep_groups, keep_nodes, relabelled, standing_in, width
from graphs.host import Host
from tests.test_edges import tiny


@pytest.mark.parametrize(("heads", "kv", "bias"), [(4, 4, False), (4, 2, False), (8, 4, True)])
@torch.no_grad()
def test_keeping_groups_equals_silencing_the_others(heads, kv, bias):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=heads,
                                         num_key_value_heads=kv, attention_bias=bias, head_dim=8))
    attention, x, kept = model.model.layers[0].self_attn, torch.randn(2, 7, 32), torch.tensor([1, kv - 1])
    if bias:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            attention.get_submodule(name).bias.normal_()
    rotary = model.model.rotary_emb(x, torch.arange(7)[None])
    small = keep_groups(attention, kept.unique())
    gate = GroupGate(groups(attention), width(attention))
    gate.gate = torch.zeros(kv).index_fill(0, kept, 1.0)
    attention.o_proj.register_forward_pre_hook(gate)
    assert groups(attention) == kv and groups(small) == len(kept.unique())
    silenced, pruned = (m(x, position_embeddings=rotary, attention_mask=None)[0] for m in (attention, small))
    assert torch.allclose(silenced, pruned, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv", "bias"), [(4, 4, False), (8, 4, True)])
@torch.no_grad()
def test_keeping_components_equals_silencing_the_others(heads, kv, bias):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=heads,
                                         num_key_value_heads=kv, attention_bias=bias, head_dim=8))
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 7, 32)
    if bias:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            attention.get_submodule(name).bias.normal_()
    kept = torch.tensor([0, 3, 7, 17, 18, 30])  # of groups 0, 2 and 3; group 1 goes
    rotary = model.model.rotary_emb(x, torch.arange(7)[None])
    small = keep_nodes(attention, kept, width(attention))
    gate = GroupGate(kv, width(attention))
    gate.gate = torch.zeros(kv * 8).index_fill(0, kept, 1.0)
    attention.o_proj.register_forward_pre_hook(gate)
    silenced, pruned = (m(x, position_embeddings=rotary, attention_mask=None)[0] for m in (attention, small))
    assert groups(small) == 3 and torch.allclose(silenced, pruned, atol=1e-5)
    assert int((small.v_proj.weight.abs().sum(1) > 0).sum()) == len(kept)


def test_dropped_components_cannot_wake_up(tiny_host):
    site = tiny_host.sites[0]
    small = keep_nodes(tiny_host.module(site.module), torch.tensor([0, 5, 20]), 16)
    x = torch.randn(2, 5, 48)
    rotary = tiny_host.model.model.rotary_emb(x, torch.arange(5)[None])
    small(x, position_embeddings=rotary, attention_mask=None)[0].square().sum().backward()
    dead = small.v_proj.weight.abs().sum(1) == 0
    assert int(dead.sum()) == 32 - 3 and not small.v_proj.weight.grad[dead].any() and not small.o_proj.weight.grad[:, dead].any()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "Gemma2ForCausalLM"])
@torch.no_grad()
def test_one_module_stands_in_for_the_attention_of_every_class(name):
    """Whole rows, padded rows and rows written from the cache, with windows shorter than the row where the class has them."""
    host = tiny(name)
    if name in ("MistralForCausalLM", "Starcoder2ForCausalLM", "GPTNeoForCausalLM"):
        host.model.config.update({"window_size" if "Neo" in name else "sliding_window": 4})
        layers = copy.deepcopy(host.model.state_dict())
        host = Host(type(host.model)(host.model.config).eval(), host.tokenizer, host.sites)
        host.model.load_state_dict(layers)
    replaced = copy.deepcopy(host.model)
    for site in host.sites:
        if site.kind == "attention":
            install(replaced, site, standing_in(replaced, site))
    ids = torch.randint(3, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left, as generation does
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [DynamicCache(config=host.config) for _ in range(2)]
    for part, seen in ((slice(0, 9), mask[:, :9]), (slice(9, 10), mask[:, :10]), (slice(10, 11), mask)):
        said = [model(input_ids=ids[:, part], attention_mask=seen, position_ids=positions[:, part], past_key_values=cache).logits
                for model, cache in zip((host.model, replaced), caches, strict=True)]
        kept = seen[:, part].bool()
        assert torch.allclose(said[0][kept], said[1][kept], atol=2e-5)
    assert torch.allclose(host.model(input_ids=ids).logits, replaced(input_ids=ids).logits, atol=2e-5)


def test_nodes_keep_their_places_when_groups_close_ranks():
    now, then = torch.tensor([1, 2, 9, 10, 11]), torch.tensor([2, 10])  # groups 0 and 2 of four components each
    assert relabelled(now, then, 4).tolist() == [2, 6] and relabelled(now, then, 1).tolist() == [1, 3]
