"""Published formats are read by their files: each gives the numbers its own library would; what does not fit is refused by name."""

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

from graphs.architectures import norm
from graphs.dictionary import Dictionary, JumpReLU, Part, ReLU, TopK, skip
from graphs.zoo import load, save_sae_lens
from tests.test_edges import tiny

D, F = 32, 20


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 7 + shape[0]))


def weights():
    return {"W_enc": draw(F, D), "b_enc": draw(F) * 0.3, "W_dec": draw(F, D) * 0.2, "b_dec": draw(D)}


def x():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def host():
    return tiny("LlamaForCausalLM")


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("skipped", [False, True])
def test_sae_lens_round_trip_both_ways_with_equal_outputs(host, tmp_path, jump, skipped):
    from sae_lens import SAE

    w, site = weights(), host.sites[3]
    parts = (Part(w["W_enc"], w["b_enc"], w["W_dec"], JumpReLU(torch.full((F,), 0.2)) if jump else ReLU()),)
    ours = Dictionary(parts + ((skip(draw(D, D) * 0.1),) if skipped else ()), w["b_dec"])
    save_sae_lens(ours, tmp_path / "layer", site, "mlp.hook_in")
    theirs = SAE.load_from_disk(tmp_path / "layer")
    with torch.no_grad():
        assert torch.allclose(theirs(x()), ours(x()), atol=1e-5)
    theirs.save_model(tmp_path / "again" / "layer_1")
    for again in (load(tmp_path / "layer", host)["L1.mlp"], load(tmp_path / "again", host, "mlp.hook_in")["L1.mlp"]):  # theirs drops the hook's name
        assert torch.allclose(again(x()), ours(x()), atol=1e-5) and torch.equal(again.parts[0].read, w["W_enc"])
        without = Dictionary(again.parts[:1], again.constant)(x())
        assert len(again.parts) == 1 + skipped and (not skipped or float((again(x()) - without).abs().max()) > 0.1)


def test_sparsify_with_its_skip(host, tmp_path):
    w, through = weights(), draw(D, D)
    folder = tmp_path / "layers.1.mlp"
    folder.mkdir()
    stored = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"], "W_skip": through}
    save_file(stored, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"transcode": True, "activation": "topk", "k": 4, "skip_connection": True}))
    found = load(tmp_path, host)["L1.mlp"]
    top = torch.relu(x() @ w["W_enc"].T + w["b_enc"]).topk(4)
    wanted = torch.zeros(5, F).scatter(1, top.indices, top.values) @ w["W_dec"] + w["b_dec"] + x() @ through.T
    assert torch.allclose(found(x()), wanted, atol=1e-4) and found.parts[0].gate == TopK(4)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_gemma_scope_before_the_norms_gain(tmp_path, suffix):
    gemma = tiny("Gemma2ForCausalLM")
    w, threshold = weights(), torch.full((F,), 0.3)
    folder = tmp_path / "layer_0" / "width_20" / "average_l0_5"
    folder.mkdir(parents=True)
    stored = {"W_enc": w["W_enc"].T.contiguous(), "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"], "threshold": threshold}
    if suffix == "npz":
        numpy.savez(folder / "params.npz", **{name: value.numpy() for name, value in stored.items()})
    else:
        save_file({{"W_enc": "w_enc", "W_dec": "w_dec"}.get(name, name): value for name, value in stored.items()}, folder / "params.safetensors")
    found = load(tmp_path, gemma, "ln2.hook_normalized")["L0.mlp"]
    gain = norm(gemma.model, gemma.sites[1].norm).gain
    pre = x() @ w["W_enc"].T + w["b_enc"]  # on the normalised stream; the site reads it times the gain
    assert torch.allclose(found(x() * gain), (pre * (pre > threshold)) @ w["W_dec"] + w["b_dec"], atol=1e-4)
    with pytest.raises(ValueError, match="a place that its files do not name"):
        load(tmp_path, gemma)


def tracer(folder, hook="mlp.hook_in", **changes):
    folder.mkdir(exist_ok=True)
    save_file(weights() | {"activation_function.threshold": torch.full((F,), 0.1)} | changes, folder / "layer_1.safetensors")
    (folder / "config.yaml").write_text(f"model_kind: transcoder_set\nfeature_input_hook: {hook}\n")
    return folder


def test_circuit_tracer_sets(host, tmp_path):
    w = weights()
    found = load(tracer(tmp_path / "set"), host)["L1.mlp"]
    pre = x() @ w["W_enc"].T + w["b_enc"]
    assert torch.allclose(found(x()), (pre * (pre > 0.1)) @ w["W_dec"] + w["b_dec"], atol=1e-4)


def refused(folder, host):
    with pytest.raises(ValueError) as error:
        load(folder, host)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name(host, tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing", host)
    (tmp_path / "empty").mkdir()
    assert "holds no transcoders" in refused(tmp_path / "empty", host)
    (tmp_path / "empty" / "layer_0.pt").write_bytes(b"\x80\x04")
    assert "pickles (layer_0.pt)" in refused(tmp_path / "empty", host)
    assert "reads hook_resid_mid" in refused(tracer(tmp_path / "a", "hook_resid_mid"), host)
    assert "W_enc is (20, 31)" in refused(tracer(tmp_path / "b", W_enc=draw(F, 31)), host)
    assert "W_skip is (3, 3)" in refused(tracer(tmp_path / "c", W_skip=draw(3, 3)), host)
    (tracer(tmp_path / "d") / "layer_1.safetensors").rename(tmp_path / "d" / "layer_7.safetensors")
    assert "for layer 7, and the model has layers 0 to 1" in refused(tmp_path / "d", host)
    whole = (tracer(tmp_path / "e") / "layer_1.safetensors").read_bytes()
    (tmp_path / "e" / "layer_1.safetensors").write_bytes(whole[:-40])
    assert "truncated or damaged" in refused(tmp_path / "e", host)


def test_an_npz_of_pickled_objects_is_refused(tmp_path):
    (tmp_path / "layer_0").mkdir()
    numpy.savez(tmp_path / "layer_0" / "params.npz", W_enc=numpy.array([{"a": 1}], dtype=object))
    assert "pickled objects" in refused(tmp_path, tiny("Gemma2ForCausalLM"))


def test_a_gate_that_sae_lens_has_not_is_refused(host, tmp_path):
    w = weights()
    with pytest.raises(ValueError, match="no transcoder with gate TopK"):
        save_sae_lens(Dictionary((Part(w["W_enc"], w["b_enc"], w["W_dec"], TopK(3)),), w["b_dec"]), tmp_path / "x", host.sites[1], "mlp.hook_in")
