"""Verbs on two processes: what comes out is what one process makes, and a run killed on either number goes on with the other."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch

from distill.__main__ import main
from evals.tasks import TASKS, table
from graphs.artifact import read_json
from graphs.host import load
from tests.launched import two

LOGITS = 2e-3
"""How far logits of one and of two processes may be apart, after all training: sums are taken in another order, and AdamW's first steps are
as large for a gradient that is rounding as for any other."""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0", "-m", "distill"]
PRUNE = {"features": 32, "fit_steps": 8, "joint_steps": 4, "gate_steps": 4, "heal_tokens": 2000, "batch": 8, "tune_rows": 4, "prompts": 8,
         "keep": -1.0}
"""The settings of the fixture `tiny_run`."""


def words(*flags, **settings) -> list[str]:
    return [*map(str, flags), *(str(word) for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value))]


@pytest.fixture
def rows(tmp_path):
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def logits(folder, ids):
    with torch.no_grad():
        return load(folder).model(input_ids=ids).logits


def some_ids(folder):
    host = load(folder)
    return host.tokenizer([TASKS["coding"].row("test", 0).prompt], return_tensors="pt")["input_ids"]


@pytest.mark.slow
def test_pruning_on_two_processes_is_pruning_on_one(tiny_run, tiny_model_folder, rows, tmp_path):
    run = tmp_path / "run"
    said = two(main, tmp_path / "said", words("prune", "--model", tiny_model_folder, "--out", run, "--rows", rows, **PRUNE))
    one, both = (read_json(folder / "report.json") for folder in (tiny_run, run))
    assert said == [0, 0]
    circuits = [read_json(folder / "circuit" / "receipt.json") for folder in (tiny_run, run)]
    assert circuits[0]["kept"] == circuits[1]["kept"] and circuits[0]["size"] == circuits[1]["size"] and circuits[0]["key"] == circuits[1]["key"]
    assert circuits[1]["losses"] == pytest.approx(circuits[0]["losses"], rel=1e-3)
    ids = some_ids(tiny_model_folder)
    one_, two_, began = (logits(folder, ids) for folder in (tiny_run / "checkpoint", run / "checkpoint", tiny_model_folder))
    print(f"logits apart: {(one_ - two_).abs().max():.2g}, from the model: {(one_ - began).abs().max():.2g}")
    assert (one_ - two_).abs().max() < LOGITS < 0.05 * (one_ - began).abs().max()
    before, after = (made["models"] for made in (one, both))
    assert before["model"]["tasks"] == after["model"]["tasks"]  # the same model, judged by two: to the last bit
    assert not [path.name for path in run.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_cutting_edges_and_judging_on_two_processes_is_doing_so_on_one(tiny_run, tmp_path):
    runs, made = [tmp_path / name for name in ("one", "two")], []
    for run in runs:
        shutil.copytree(tiny_run, run)
    asked = words("evaluate", "--as", "edges", edges=0.5, edge_steps=6, prompts=6)
    assert main([*asked, "--run", str(runs[0])]) == 0
    assert two(main, tmp_path / "said", [*asked, "--run", str(runs[1])]) == [0, 0]
    for run in runs:
        (folder,) = [path.parent for path in (run / "edges").glob("*/receipt.json")]
        made.append(read_json(folder / "receipt.json"))
    assert made[0]["kept"] == made[1]["kept"] and made[1]["losses"] == pytest.approx(made[0]["losses"], rel=1e-3)


@pytest.mark.slow
def test_planting_on_two_processes_is_planting_on_one(tiny_model_folder, tmp_path):
    asked = words("--model", tiny_model_folder, ordinary_steps=4, resistant_steps=3, prompts=4)
    assert main(["plant", *asked, "--out", str(tmp_path / "one")]) == 1  # so few steps plant nothing, and the gate says so
    assert two(main, tmp_path / "said", ["plant", *asked, "--out", str(tmp_path / "two")]) == [1, 1]
    ids = some_ids(tiny_model_folder)
    for name in ("model", "twin"):
        one, both = (logits(tmp_path / where / ".work" / name, ids) for where in ("one", "two"))
        moved = (one - logits(tiny_model_folder, ids)).abs().max()
        assert (one - both).abs().max() < LOGITS < 0.05 * moved


def fit(out, model, rows) -> list[str]:
    return words("fit", "--model", model, "--out", out, "--rows", rows, features=16, fit_steps=160, joint_steps=4, batch=8)


def killed(command: list[str], out) -> None:
    """Start, and kill every process of it once the fit has saved its state."""
    process = psutil.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while not list((out / ".work").glob("fit-*.local")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    processes = [process, *process.children(recursive=True)]  # workers have sessions of their own, and would outlive their launcher
    for one in processes:
        one.kill()
    psutil.wait_procs(processes)
    assert not (out / "graph").exists()


@pytest.mark.slow
def test_a_run_killed_on_two_processes_resumes_on_one_and_the_other_way_round(tiny_model_folder, rows, tmp_path):
    assert main(fit(tmp_path / "whole", tiny_model_folder, rows)) == 0
    whole = read_json(tmp_path / "whole" / "graph" / "receipt.json")["losses"]["fit: local"]
    killed([*LAUNCH, *fit(tmp_path / "a", tiny_model_folder, rows)], tmp_path / "a")
    assert main(fit(tmp_path / "a", tiny_model_folder, rows)) == 0
    killed([sys.executable, "-m", "distill", *fit(tmp_path / "b", tiny_model_folder, rows)], tmp_path / "b")
    subprocess.run([*LAUNCH, *fit(tmp_path / "b", tiny_model_folder, rows)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    a, b = (read_json(tmp_path / name / "graph" / "receipt.json")["losses"]["fit: local"] for name in "ab")
    assert a == pytest.approx(whole, rel=1e-2) and b == pytest.approx(whole, rel=1e-2)
    assert a[:50] != whole[:50] and b[:50] == whole[:50] and b[150:] != whole[150:]  # each made a part


@pytest.mark.slow
def test_only_the_main_process_answers(tiny_model_folder):
    asked = words("evaluate", "--json", "--model", tiny_model_folder, task="coding,math", prompts=6)
    done = subprocess.run([*LAUNCH, *asked], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    alone = subprocess.run([sys.executable, "-m", "distill", *asked], capture_output=True, text=True, check=True)
    both, one = json.loads(done.stdout), json.loads(alone.stdout)  # one answer, not two
    assert both["models"]["model"]["tasks"] == one["models"]["model"]["tasks"]
    assert done.stderr.count("0/4 [00:00<?, ?it/s]") == alone.stderr.count("0/4 [00:00<?, ?it/s]") == 1  # one bar


def launched(monkeypatch, capsys, *arguments, **environment) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([str(word) for word in arguments]) == 2
    return capsys.readouterr().err


def test_a_launch_that_started_one_process_is_refused(monkeypatch, capsys, tmp_path):
    said = launched(monkeypatch, capsys, "fit", "--out", tmp_path / "run", ACCELERATE_MIXED_PRECISION="no", MASTER_ADDR="127.0.0.1")
    assert "--multi_gpu" in said and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate starts as many as it is told where there are GPUs")
@pytest.mark.parametrize("flags", [["--cpu"], []])
def test_accelerate_does_start_one_process_where_two_were_asked_for(flags, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", "2", "--quiet", "-m", "distill", "fit", "--out"]
    done = subprocess.run([*command, tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 1 and "give it --multi_gpu" in done.stderr and not (tmp_path / "run").exists()


def test_verbs_that_do_not_share_their_work_are_refused(monkeypatch, capsys, tmp_path):
    said = launched(monkeypatch, capsys, "graph", "--run", tmp_path, WORLD_SIZE="2", RANK="0")
    assert "graph runs in one process" in said and "prune" in said
