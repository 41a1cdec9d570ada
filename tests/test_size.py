"""Sizes count what is there once, and every model is timed on the same work."""

from dataclasses import replace

import pytest
import torch

from evals import size
from evals.size import parameters, speed


def expected_stored(config):
    width, inner = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * width * width + 3 * width * inner + 2 * width) + width


def test_embeddings_are_apart_and_a_tied_head_counts_once(tiny_host):
    config, measured = tiny_host.config, parameters(tiny_host.model)
    assert measured.stored == measured.live == expected_stored(config)
    assert measured.embeddings == config.vocab_size * config.hidden_size
    assert measured.bytes == 4 * (measured.stored + measured.embeddings)


def test_an_untied_head_is_an_embedding_too(tiny_host):
    tiny_host.model.lm_head.weight = torch.nn.Parameter(tiny_host.model.lm_head.weight.detach().clone())
    measured = parameters(tiny_host.model)
    assert measured.embeddings == 2 * tiny_host.config.vocab_size * tiny_host.config.hidden_size
    assert measured.stored == expected_stored(tiny_host.config)


def test_zeros_are_stored_but_not_live(tiny_host):
    before = parameters(tiny_host.model)
    mlp = tiny_host.module("model.layers.1.mlp")
    with torch.no_grad():
        mlp.gate_proj.weight[:10] = 0.0
        mlp.down_proj.weight[:, :10] = 0.0
    after = parameters(tiny_host.model)
    assert after.stored == before.stored and before.live - after.live == 2 * 10 * tiny_host.config.hidden_size
    assert parameters(tiny_host.model.to(torch.bfloat16)).bytes * 2 == after.bytes


def test_models_take_turns_and_write_equally_much(tiny_host, monkeypatch):
    turns = []
    original = size.decode
    hosts = {"a": tiny_host, "b": replace(tiny_host)}

    def watched(host, ids, new_tokens, *rest):
        turns.append(("a" if host is hosts["a"] else "b", len(ids), new_tokens))
        written = original(host, ids, new_tokens, *rest)
        assert {len(row) for row in written} == {new_tokens}
        return written

    monkeypatch.setattr(size, "decode", watched)
    rates = speed(hosts, ["x", "12+3="], new_tokens=6, repeats=2)
    assert turns == [("a", 32, 4), ("b", 32, 4)] + [("a", 32, 6), ("b", 32, 6)] * 2  # a warm-up, then ABAB
    assert {name: len(values) for name, values in rates.items()} == {"a": 2, "b": 2} and min(rates["a"] + rates["b"]) > 0


def test_speed_of_nothing_is_refused(tiny_host):
    with pytest.raises(ValueError, match="at least one"):
        speed({"a": tiny_host}, [])
