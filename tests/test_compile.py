"""Compile: the dense stock model is the running circuit, for every target and for ragged widths; reloading needs no code of ours."""

import json

import pytest
import torch

from distill.compile import compile_circuit, home, legal_groups, parity, reload_gate
from evals.tasks import TASKS
from graphs.architectures import ARCHITECTURES
from graphs.batches import collate, encode
from graphs.host import Host, load, save
from graphs.replace import LAYERS, from_noise
from tests.test_edges import tiny


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


def test_a_checkpoint_generates_as_its_source_is_told_to(tiny_host):
    tiny_host.model.generation_config.update(eos_token_id=[2, 7], repetition_penalty=1.1)
    made = compile_circuit(from_noise(tiny_host, 8, 0)).model.generation_config
    assert made.eos_token_id == [2, 7] and made.repetition_penalty == 1.1


def test_attention_without_a_home_is_refused_at_the_door():
    host = tiny("Qwen3ForCausalLM")
    with pytest.raises(ValueError, match="--attention kept: Qwen3ForCausalLM norms its queries and keys"):
        home(host.model, "auto", kept=True)
    assert home(host.model, "auto") == "ArceeForCausalLM" and home(host.model, "auto", neurons=True, kept=True) == "Qwen3ForCausalLM"


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


@pytest.mark.slow
@pytest.mark.parametrize("target", ["arcee", "llama", "own", "neurons", "layers"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not ARCHITECTURES[name].post])
def test_the_export_matrix_round_trips_in_a_fresh_process_or_is_refused(name, target, tiny_tokenizer, tmp_path):
    source = tiny(name, vocab_size=len(tiny_tokenizer))
    host = Host(source.model, tiny_tokenizer, source.sites)
    basis, target = (target, "own") if target in ("neurons", "layers") else ("features", target)
    try:
        home(host.model, target, basis != "features")
    except ValueError as refusal:
        assert f"--target {target}: " in str(refusal)  # the table in the docs, generated by another test, says which are
        return
    made = from_noise(host, 24, 0, basis=basis)
    kept = {site.name: torch.tensor([0]) if site.kind == "attention" else torch.arange(3, 15) for site in made.sites}
    small = made.pruned(kept | {LAYERS: torch.tensor([1])})
    compiled = compile_circuit(small, target)
    save(compiled, tmp_path / "model", torch.float32)
    ids = torch.randint(3, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    assert reload_gate(tmp_path / "model", compiled, "def solve", ids[0].tolist(), tmp_path, 4)["max_abs_logit_diff"] <= 1e-5
    with torch.no_grad():
        assert float((small(ids) - load(tmp_path / "model").model(input_ids=ids).logits).abs().max()) <= 1e-5
