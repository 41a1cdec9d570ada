"""distill export: every dtype and target reloads as what it says; the card tells the run's numbers; failures leave nothing behind."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill import export
from distill.__main__ import main
from distill.runs import begun
from graphs.batches import collate
from graphs.host import load
from graphs.replace import Replacement


@pytest.mark.parametrize(("target", "dtype", "name"), [
    ("arcee", "float32", "ArceeForCausalLM"), ("llama", "bfloat16", "LlamaForCausalLM"), ("own", "float16", "LlamaForCausalLM")])
def test_every_target_and_dtype_is_the_circuit_as_far_as_it_rounds(tiny_run, tmp_path, capsys, target, dtype, name):
    out = tmp_path / "out"
    assert main(["export", str(tiny_run), "--target", target, "--dtype", dtype, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}
    assert json.loads((out / "config.json").read_text())["architectures"] == [name] == [said["class"]]
    assert said["reload"] <= 1e-4 and said["max_abs_logit_diff"] <= (1e-5 if dtype == "float32" else 0.2)
    assert said["size"]["bytes"] == (out / "model.safetensors").stat().st_size and said["runtimes"]["transformers"].startswith("verified")
    _, host, data = begun(tiny_run)
    circuit, batch = Replacement.load(tiny_run / "circuit", host), collate(data.rows[:4], data.pad)
    with torch.no_grad():
        gap = (circuit(batch.ids) - load(out).model(input_ids=batch.ids).logits)[batch.real].abs().max()
    assert float(gap) <= said["max_abs_logit_diff"] + 1e-6  # those rows are among the 32 that it measured


def test_the_card_is_read_by_the_hub_and_holds_the_runs_numbers(tiny_run, tmp_path):
    main(["export", str(tiny_run), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    data, report = yaml.safe_load(front), json.loads((tiny_run / "report.json").read_text())
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == report["models"]["checkpoint"]["tasks"]["coding"]["score"]["value"]
    assert "Whether the model holds a backdoor was not measured" in body and report["command"] in body and "not kept" in body
    assert "Vocabulary" not in body  # all rows are there
    from huggingface_hub import ModelCard

    ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    receipt = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert receipt["run"]["config"]["task"] == "coding" and set(receipt["keys"]) >= {"graph", "circuit", "checkpoint"}


def test_a_folder_that_is_no_export_is_never_replaced(tiny_run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for where in (tmp_path / "mine", tiny_run):
        assert main(["export", str(tiny_run), "--out", str(where)]) == 2
        assert "it is there already and no export of ours" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work" and (tiny_run / "circuit").is_dir()
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "out")]) == 0 == main(["export", str(tiny_run), "--out", str(tmp_path / "out")])


def test_weights_that_overflow_are_refused(tiny_run, tmp_path, capsys, monkeypatch):
    real = export.compile_circuit

    def large(circuit, target):
        made = real(circuit, target)
        made.model.model.norm.weight.data.mul_(1e6)
        return made

    monkeypatch.setattr(export, "compile_circuit", large)
    assert main(["export", str(tiny_run), "--dtype", "float16", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert ("overflow in it; give bfloat16" in message or "answers differently" in message) and not (tmp_path / "out").exists()


def test_a_failure_leaves_no_folder(tiny_run, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("reload gate: no")

    monkeypatch.setattr(export, "reload_gate", broken)
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "out")]) == 2
    assert "reload gate: no" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_upload_that_fails_is_one_sentence_and_keeps_the_folder(tiny_run, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def offline(*_args, **_options):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 2
    assert "the upload failed (ConnectionError); log in" in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_upload_sends_the_folder(tiny_run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    sent = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_args, **options: sent.append(options["private"]))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda *_args, **options: sent.append(options) or "https://hub/me/mine")
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 0
    assert sent[0] is True and sent[1]["repo_id"] == "me/mine" and Path(sent[1]["folder_path"]) == tmp_path / "out"
    assert capsys.readouterr().out.strip().endswith("https://hub/me/mine")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 2 and "the run has not finished" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "basis", "expected"), [
    ("ArceeForCausalLM", "features", "not expected"), ("OPTForCausalLM", "features", "not tried"), ("LlamaForCausalLM", "neurons", "not tried")])
def test_runtimes_say_what_was_verified_and_why_not(name, basis, expected):
    said = export.runtimes(name, basis, 0.0)
    assert said["vLLM, native"].startswith(expected) and said["GGUF (llama.cpp)"].startswith(expected)
