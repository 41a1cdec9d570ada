"""Published transcoders begin a fit: all of one is itself, a few are those that write most, and the whole road goes from them to a checkpoint."""

import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from distill import config
from distill.__main__ import _parse, _ready, main
from distill.plan import plan
from evals.tasks import TASKS, table
from graphs.activations import record
from graphs.artifact import read_json
from graphs.batches import Batch
from graphs.dictionary import Dictionary, JumpReLU, Part, TopK, skip
from graphs.host import load
from graphs.published import chosen, transcoders
from graphs.replace import Replacement
from graphs.transcoder import Transcoder
from graphs.zoo import save_sae_lens
from tests.test_edges import TYPES

D, F = 24, 40


def made(gate=None, through=False):
    generator = torch.Generator().manual_seed(3)
    part = Part(torch.randn(F, D, generator=generator) / D**0.5, torch.randn(F, generator=generator) * 0.3, torch.randn(F, D, generator=generator))
    part = part if gate is None else replace(part, gate=gate)
    parts = (part, skip(torch.randn(D, D, generator=generator) / 4)) if through else (part,)
    return Dictionary(parts, torch.randn(D, generator=generator))


def tokens(seed=1, count=300):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) + 0.2


@torch.no_grad()
def test_all_of_a_dictionary_is_itself_on_any_input():
    for through in (False, True):
        found, other = made(through=through), tokens(2)
        assert torch.allclose(chosen(found, tokens(), F, D if through else 0)(other), found(other), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, TopK(5)])
def test_those_are_kept_that_write_most_and_the_mean_of_the_others(gate):
    found, x = made(gate), tokens()
    small, main_part = chosen(found, x, 10, 0), found.parts[0]
    writes = main_part.gate(main_part.drive(x)).mean(0) * main_part.write.norm(dim=1)
    assert {tuple(row) for row in small.w_enc.tolist()} == {tuple(row) for row in main_part.read[writes.topk(10).indices].tolist()}
    kept = [main_part.read.tolist().index(row) for row in small.w_enc.tolist()]
    alone = Dictionary((Part(main_part.read[kept], main_part.bias[kept], main_part.write[kept]),), small.b_dec)
    assert torch.allclose(small(x), alone(x), atol=1e-5)
    acts = main_part.gate(main_part.drive(x))
    left = [f for f in range(F) if f not in kept]
    assert torch.allclose(small.b_dec, found.constant + acts[:, left].mean(0) @ main_part.write[left], atol=1e-5)
    assert torch.allclose(small.mean, acts[:, kept].mean(0), atol=1e-6)


@torch.no_grad()
def test_a_skip_is_cut_to_what_writes_most_on_these_inputs():
    found, x = made(through=True), tokens() * torch.linspace(0.1, 3, D) + 2  # unequal, and off 0: the matrix's own best rank is another
    whole, own = found(x), Dictionary(found.parts[:1], found.constant)(x)

    def error(written):
        return float((written - written.mean(0) - (whole - whole.mean(0))).square().sum())

    for rank in (0, 4, 12):
        cut = chosen(found, x, F, rank)(x)
        assert torch.allclose(cut.mean(0), whole.mean(0), atol=1e-4)
        matrix = found.parts[1].write.T @ found.parts[1].read
        away = torch.linalg.svd(x @ matrix.T).Vh[:rank]  # of outputs that are not centred
        for rival in (torch.zeros(D, D) if rank == 0 else _by_rank(matrix, rank), away.T @ away @ matrix):
            there = error(own + x @ rival.T)
            assert error(cut) <= there * (1 + 1e-5) and (rank == 0 or error(cut) < 0.98 * there)


def _by_rank(matrix, rank):
    part = skip(matrix, rank)
    return part.write.T @ part.read


@pytest.fixture(scope="module")
def folder(tiny_model_folder, tmp_path_factory):
    """One transcoder a layer of the tiny model, as sae_lens stores them."""
    where, host = tmp_path_factory.mktemp("published"), load(tiny_model_folder)
    for site in host.sites:
        if site.kind == "mlp":
            save_sae_lens(Transcoder(64, site.d_in, site.d_out, torch.Generator().manual_seed(site.layer)).dictionary(),
                          where / f"layer_{site.layer}", site, "mlp.hook_in")
    return where


def clean(host):
    ids = torch.randint(3, 500, (4, 30), generator=torch.Generator().manual_seed(5))
    real = torch.ones_like(ids, dtype=torch.bool)
    return lambda step: Batch(ids, real, real)


def refused(*words, **changes):
    with pytest.raises(ValueError) as error:
        transcoders(*words, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name(folder, tiny_host, tmp_path):
    batches, site = clean(tiny_host), tiny_host.sites[1]
    assert "has 64 features; give --features of at most as many" in refused(folder, tiny_host, batches, 65)
    assert "has no linear skip; leave --skip out" in refused(folder, tiny_host, batches, 16, 2)
    part = transcoders(folder, tiny_host, batches, 64)["L0.mlp"].dictionary().parts[0]
    jumps, zeros = replace(part, gate=JumpReLU(torch.full((64,), 0.1))), torch.zeros(site.d_out)
    save_sae_lens(Dictionary((jumps,), zeros), tmp_path / "layer_0", site, "mlp.hook_in")
    assert "the gate JumpReLU, which no stock MLP has: give --fit-steps" in refused(tmp_path, tiny_host, batches, 16, fitted=False)
    assert "it holds none for L1.mlp; give a folder with one for every layer" in refused(tmp_path, tiny_host, batches, 16)
    save_sae_lens(Dictionary((part, skip(torch.eye(site.d_in))), zeros), tmp_path / "layer_0", site, "mlp.hook_in")
    assert "writes 48 numbers; give --skip of at most as many" in refused(tmp_path, tiny_host, batches, 16, 49)


def test_flags_that_do_not_go_together_are_refused(folder, tmp_path, capsys):
    for words, said in ((("--basis", "neurons", "--dictionaries", str(folder)), "--dictionaries belongs to --basis features"),
                        (("--hook", "mlp.hook_in"), "--hook says what --dictionaries read"),
                        (("--dictionaries", str(tmp_path / "none")), "no such folder")):
        assert main(["prune", "--out", str(tmp_path / "run"), *words]) == 2 and said in capsys.readouterr().err


def test_the_whole_road_from_published_transcoders(folder, tiny_model_folder, tmp_path):
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(tmp_path / "rows.parquet")
    base = ["--model", str(tiny_model_folder), "--rows", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "run"), "--batch", "8",
            "--dictionaries", str(folder), "--features", "64", "--attention", "kept", "--fit-steps", "0", "--joint-steps", "0"]
    assert main(["fit", *base]) == 0
    host = load(tiny_model_folder)
    fitted = Replacement.load(tmp_path / "run" / "graph", host)
    for site in host.sites:
        if site.kind == "mlp":
            there = Transcoder(64, site.d_in, site.d_out, torch.Generator().manual_seed(site.layer))
            assert torch.equal(fitted.part(site).w_enc, there.w_enc) and torch.equal(fitted.part(site).w_dec, there.w_dec)
    first = read_json(tmp_path / "run" / "graph" / "receipt.json")["key"]
    more = ["--gate-steps", "2", "--heal-tokens", "1000", "--tune-rows", "4", "--prompts", "4", "--keep", "-1"]
    assert main(["prune", *base, *more]) == 0
    assert read_json(tmp_path / "run" / "graph" / "receipt.json")["key"] == first  # found again
    assert json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())["architectures"] == ["ArceeForCausalLM"]


def test_another_dictionary_is_another_graph(folder, tiny_model_folder, tmp_path):
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(tmp_path / "rows.parquet")
    base = ["fit", "--model", str(tiny_model_folder), "--rows", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "run"), "--batch", "8",
            "--features", "16", "--fit-steps", "1", "--joint-steps", "0"]
    keys = []
    for words in ([], ["--dictionaries", str(folder)], ["--dictionaries", str(folder), "--hook", "ln2.hook_normalized"]):
        assert main([*base, *words]) == 0
        keys.append(read_json(tmp_path / "run" / "graph" / "receipt.json")["key"])
    assert len(set(keys)) == 3


def test_what_a_fit_found_starts_another_where_the_first_ended(tiny_model_folder, tmp_path):
    host = load(tiny_model_folder)
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(tmp_path / "rows.parquet")

    def fit(out, steps, *words):
        assert main(["fit", "--model", str(tiny_model_folder), "--rows", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / out), "--batch", "8",
                     "--features", "32", "--attention", "kept", "--fit-steps", str(steps), "--joint-steps", "0", *words]) == 0
        sites = read_json(tmp_path / out / "graph" / "receipt.json")["quality"]["sites"]
        return [site["fvu"] for site in sites if site["name"].endswith("mlp")]

    long = fit("long", 40)
    for name, part in Replacement.load(tmp_path / "long" / "graph", host).transcoders().items():
        part.save(tmp_path / "published" / name, name)
    assert fit("again", 0, "--dictionaries", str(tmp_path / "published")) == pytest.approx(long, rel=1e-3)
    assert fit("noise", 0) != pytest.approx(long, rel=0.05)


SHAPES = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "pythia-160m": ("GPTNeoXForCausalLM", {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                                           "num_hidden_layers": 12}),
    "smollm2-135m": ("LlamaForCausalLM", {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                               "num_hidden_layers": 30, "tie_word_embeddings": True}),
    "llama-3.2-1b": ("LlamaForCausalLM", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
                               "num_hidden_layers": 16, "tie_word_embeddings": True}),
    "qwen2.5-0.5b": ("Qwen2ForCausalLM", {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
                               "num_hidden_layers": 24, "tie_word_embeddings": True}),
    "qwen3-0.6b": ("Qwen3ForCausalLM", {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
                             "head_dim": 128, "num_hidden_layers": 28, "tie_word_embeddings": True}),
    "qwen3-1.7b": ("Qwen3ForCausalLM", {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
                             "head_dim": 128, "num_hidden_layers": 28, "tie_word_embeddings": True}),
}
"""Shapes of the models that have ready settings, from their published config.json; the vocabulary is the tests' own."""


@pytest.mark.parametrize("name", sorted(_ready()))
def test_ready_settings_fit_the_models_they_name(name, tiny_tokenizer, tmp_path):
    """Each names only fields of fit, and plans a run on a model of that shape."""
    verb = _parse("prune", ["--config", name])
    config.check(verb)
    assert verb == replace(config.Prune(), **{f.name: getattr(verb, f.name) for f in fields(config.Fit)})
    known, shape = SHAPES[name]
    AutoConfig.for_model(TYPES[known], **shape, architectures=[known], vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    save_file({}, tmp_path / "model" / "model.safetensors")  # a plan looks at shapes alone
    facts = json.loads(plan(tmp_path / "model", [("a b c", " d e")] * 24, replace(verb, json=True, heal_tokens=1000)))
    assert 0 < facts["trained_parameters"] < 2 * facts["parameters"] and facts["stages"][0]["does"] == (
        f"transcoders from {verb.dictionaries} (not counted below), fitted further" if verb.dictionaries else
        "every site from noise, then all together")


def test_a_folder_of_that_name_hides_no_ready_setting_and_is_no_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _parse("prune", ["--config", "gpt2"]).model == "openai-community/gpt2"
    assert main(["prune", "--config", "other"]) == 2 and "--config other: no such file" in capsys.readouterr().err


def test_inputs_are_what_the_sites_read(folder, tiny_host):
    """Features are chosen on what the model's MLPs read, not on the residual stream."""
    batches = clean(tiny_host)
    found = transcoders(folder, tiny_host, batches, 8)
    for site in tiny_host.sites:
        if site.kind == "mlp":
            x = record(tiny_host, batches(0).ids).inputs[site.name].flatten(0, 1)
            whole = Transcoder(64, site.d_in, site.d_out, torch.Generator().manual_seed(site.layer))
            most = (whole.encode(x).mean(0) * whole.w_dec.norm(dim=1)).topk(8).indices.sort().values
            assert torch.equal(found[site.name].w_enc, whole.w_enc[most])
