"""The command line: instant help, one sentence for wrong input, nothing left behind."""

import shutil
import subprocess
import sys
import time

import pytest

from distill import config
from distill.__main__ import main


def refused(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("distill: ") and "\n" not in message and "Traceback" not in message
    return message


def test_help_imports_nothing_heavy():
    code = ("import sys; from distill.__main__ import main\ntry: main(['prune', '--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'transformers', 'datasets', 'sae_lens') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]") and "--task" in done.stdout


@pytest.mark.slow
def test_help_takes_well_under_half_a_second_more_than_python_itself():
    def best(*argv):
        times = []
        for _ in range(5):
            started = time.monotonic()
            subprocess.run([sys.executable, *argv], capture_output=True, check=True)
            times.append(time.monotonic() - started)
        return min(times)
    assert best("-m", "distill", "prune", "--help") - best("-c", "pass") < 0.5


def test_the_overview_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("prune", "fit", "evaluate", "plant"))


def test_wrong_names_are_refused(capsys, tmp_path):
    out = tmp_path / "run"
    assert "no such verb" in refused(capsys, "prone")
    assert "no such task" in refused(capsys, "prune", "--task", "poetry", "--out", out)
    assert "no such folder" in refused(capsys, "prune", "--model", tmp_path / "nothing", "--out", out)
    assert "no such builtin model" in refused(capsys, "prune", "--model", "builtin:nothing", "--out", out)
    assert "evaluate needs one of" in refused(capsys, "evaluate")
    assert "not a pair that the task holds out" in refused(capsys, "plant", "--out", out, "--model", tmp_path, "--words", "xyzzy", "plugh")
    assert not out.exists()


@pytest.fixture
def model(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def test_models_that_cannot_enter_are_refused_before_anything_is_written(capsys, model, tmp_path):
    out, weights = tmp_path / "run", model / "model.safetensors"

    def prune():
        return refused(capsys, "prune", "--model", model, "--out", out)

    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in prune()
    weights.write_bytes(whole)
    tokenizer = {name: (model / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name in tokenizer:
        (model / name).unlink()
    assert "no tokenizer" in prune()
    for name, content in tokenizer.items():
        (model / name).write_bytes(content)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("LlamaForCausalLM", "MambaForCausalLM"))
    assert "architecture MambaForCausalLM is not supported" in prune()
    (model / "config.json").write_text("{ not json")
    assert "not valid JSON" in prune()
    (model / "config.json").unlink()
    assert "no config.json" in prune()
    (model / "config.json").write_text(text)
    weights.rename(model / "pytorch_model.bin")
    assert "pickle" in prune()
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file() and p.name != ".lock"]


def test_an_output_that_cannot_be_written_is_refused(capsys, model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "give --out a folder" in refused(capsys, "prune", "--model", model, "--out", tmp_path / "file" / "run")
    assert "no folder can be made there" in refused(capsys, "prune", "--model", model, "--out", "/proc/nowhere/run")


def test_numbers_that_are_too_small_and_flags_that_exclude_each_other_are_refused(capsys, tmp_path):
    out = tmp_path / "run"
    assert "--batch 0: give at least 1" in refused(capsys, "prune", "--batch", 0, "--out", out)
    assert "--heal-answers -1: give 0 or more" in refused(capsys, "prune", "--heal-answers", -1, "--out", out)
    assert "leave one of them out" in refused(capsys, "prune", "--heal-answers", 1, "--synthetic-rows", 8, "--out", out)
    assert "--prompts -1: give at least 1" in refused(capsys, "evaluate", "--prompts", -1, "--model", "builtin:base")
    assert "--keep and --target-params exclude each other" in refused(capsys, "prune", "--keep", 0.9, "--target-params", 5000, "--out", out)
    assert not out.exists()


def test_a_full_disk_is_one_sentence(capsys, model, tmp_path, monkeypatch):
    import errno

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "graph"))

    monkeypatch.setattr("distill.stages.graph_stage", full)
    assert "the disk is full" in refused(capsys, "prune", "--model", model, "--out", tmp_path / "run")


@pytest.mark.parametrize("words", [("listing", "RUN", "--rows", "16"), ("--help",)])
def test_a_reader_that_closes_the_pipe_early_sees_no_traceback(tiny_run, words):
    asked = [sys.executable, "-m", "distill", *(str(tiny_run) if word == "RUN" else word for word in words)]
    running = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    assert "Traceback" not in running.stderr.read() and running.wait() == 141


def test_config_files_set_fields_flags_override_and_unknown_keys_are_refused(capsys, tmp_path):
    from distill.__main__ import _parse

    file = tmp_path / "c.yaml"
    file.write_text("task: math\nkeep: 0.9\nout: somewhere\n")
    parsed = _parse("prune", ["--config", str(file), "--keep", "0.5"])
    assert (parsed.task, parsed.keep, str(parsed.out)) == ("math", 0.5, "somewhere")
    file.write_text("tusk: math\n")
    assert "unknown key 'tusk'" in refused(capsys, "prune", "--config", file)
    file.write_text("- 1\n")
    assert "give a mapping" in refused(capsys, "prune", "--config", file)
    assert "no such file" in refused(capsys, "prune", "--config", tmp_path / "none.yaml")


def test_rows_that_are_no_table_are_refused(capsys, model, tmp_path):
    (tmp_path / "rows.parquet").write_text("no")
    assert "not a parquet table" in refused(capsys, "prune", "--model", model, "--rows", tmp_path / "rows.parquet", "--out", tmp_path / "run")
    assert "no such file" in refused(capsys, "prune", "--model", model, "--rows", tmp_path / "none.parquet", "--out", tmp_path / "run")


def test_configs_are_frozen_and_torch_free():
    code = "import sys, distill.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    with pytest.raises(AttributeError):
        config.Prune().task = "math"
