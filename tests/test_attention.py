"""Attention nodes: dropping a group equals silencing it, with and without grouped queries and biases."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.attention import GroupGate, group_width, groups, keep_groups


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
    gate = GroupGate(group_width(attention))
    gate.gate = torch.zeros(kv).index_fill(0, kept, 1.0)
    attention.o_proj.register_forward_pre_hook(gate)
    assert groups(attention) == kv and groups(small) == len(kept.unique())
    silenced, pruned = (m(x, position_embeddings=rotary, attention_mask=None)[0] for m in (attention, small))
    assert torch.allclose(silenced, pruned, atol=1e-5)
