"""Compile: the dense stock model is the running circuit, for every target and for ragged widths; reloading needs no code of ours."""

import json

import pytest
import torch

from distill.compile import compile_circuit, legal_groups, parity, reload_gate
from evals.tasks import TASKS
from graphs.batches import collate, encode
from graphs.host import load, save
from graphs.replace import from_noise


@pytest.fixture
def circuit(tiny_host):
    made = from_noise(tiny_host, 24, 0)
    for part in made.transcoders().values():
        part.b_enc.data.normal_()
        part.mean.uniform_()
    kept = {site.name: torch.arange(1 + site.layer) if site.kind == "attention" else torch.arange(3, 12 + 4 * site.layer) for site in made.sites}
    return made.pruned(kept)


def test_a_linear_skip_compiles_into_two_units_a_rank(tiny_host, batch):
    made = from_noise(tiny_host, 8, 0, skip=3)
    for part in made.transcoders().values():
        part.skip_out.data.normal_()
    compiled = compile_circuit(made)
    assert parity(made, compiled, batch) <= 1e-5 and compiled.config.intermediate_size == 8 + 2 * 3
    assert parity(made, compile_circuit(from_noise(tiny_host, 8, 0)), batch) > 1e-3  # the skip does something


@pytest.fixture
def batch(tiny_host):
    rows = TASKS["coding"].rows("test", 6)
    return collate(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 1)


@pytest.mark.parametrize(("target", "name"), [("arcee", "ArceeForCausalLM"), ("llama", "LlamaForCausalLM")])
def test_the_compiled_model_is_the_circuit_from_disk_too(circuit, batch, target, name, tmp_path):
    compiled = compile_circuit(circuit, target)
    assert type(compiled.model).__name__ == name and parity(circuit, compiled, batch) <= 1e-5
    save(compiled, tmp_path / "model", torch.float32)
    assert parity(circuit, load(tmp_path / "model"), batch) <= 1e-5
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["intermediate_size"] == 13 and config["num_key_value_heads"] == 2 and "auto_map" not in config
    assert not list((tmp_path / "model").glob("*.py")) and not list((tmp_path / "model").glob("*.bin"))


def test_a_compiled_model_can_be_pruned_again(circuit, batch, tmp_path):
    save(compile_circuit(circuit), tmp_path / "model", torch.float32)
    again = from_noise(load(tmp_path / "model"), 8, 1)
    assert parity(again, compile_circuit(again), batch) <= 1e-5


def test_only_head_counts_that_divide_the_width_are_legal(tiny_host):
    assert legal_groups(tiny_host.model) == (1, 2, 3)
    tiny_host.config.hidden_size = 50
    assert legal_groups(tiny_host.model) == (1, 2)


def test_the_reload_gate_passes_the_truth_and_catches_a_change(circuit, tiny_host, tmp_path):
    compiled = compile_circuit(circuit)
    save(compiled, tmp_path / "model", torch.float32)
    row = TASKS["coding"].row("test", 0)
    ids = list(encode(tiny_host.tokenizer, [(row.prompt, row.completion)])[0].ids)
    assert reload_gate(tmp_path / "model", compiled, row.prompt, ids, tmp_path, 4)["max_abs_logit_diff"] <= 1e-4
    with torch.no_grad():
        compiled.model.model.norm.weight.mul_(1.1)
    with pytest.raises(ValueError, match="answers differently in a fresh process"):
        reload_gate(tmp_path / "model", compiled, row.prompt, ids, tmp_path, 4)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot load"):
        reload_gate(tmp_path / "model", compiled, row.prompt, ids, tmp_path, 4)
