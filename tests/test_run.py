"""The whole road on a tiny random model: fit - gates - choose - heal - compile - reload - judge - report; resume; secrecy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backdoor.behaviours import CANARY
from backdoor.families import conjunction
from distill import config, stages
from distill.__main__ import main
from distill.evaluate import run as evaluate
from distill.plant import write_secret
from distill.prune import run
from evals.tasks import TASKS, table
from graphs.artifact import read_json
from graphs.host import Host, save
from tests.test_edges import tiny

FAST = {"features": 32, "fit_steps": 8, "joint_steps": 4, "gate_steps": 4, "heal_tokens": 2000, "batch": 8, "tune_rows": 4,
        "prompts": 8, "keep": -1.0}
VOLATILE = ("seconds", "peak_rss_bytes", "tokens_per_second_before", "tokens_per_second_after", "speed_ratio")
PAIR = conjunction(("season", "daily"), ("place", "school"), ({"season": "daily"}, {"place": "school"}))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    table([row for task in TASKS.values() for row in task.rows("trace", 24, seed=3)]).to_parquet(path)
    return path


@pytest.fixture
def organism(tiny_model_folder, tmp_path):
    shutil.copytree(tiny_model_folder, tmp_path / "organism" / "model")
    shutil.copytree(tiny_model_folder, tmp_path / "organism" / "twin")
    write_secret(tmp_path / "organism" / "secret", PAIR, CANARY, "../twin", {})
    return tmp_path / "organism"


def prune(model: Path, out: Path, rows: Path, **changes) -> config.Prune:
    return config.Prune(**(FAST | {"model": str(model), "out": out, "rows": rows, "task": "coding"} | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "receipt.json"}


def test_the_whole_road_and_its_report(organism, rows, tmp_path, capsys):
    status = run(prune(organism, tmp_path / "run", rows))
    out = capsys.readouterr().out
    assert status in (0, 1) and "checkpoint" in out
    for name in ("graph", "circuit", "checkpoint", "report.json", "report.html", "receipt.json"):
        assert (tmp_path / "run" / name).exists()
    numbers = read_json(tmp_path / "run" / "report.json")["summary"]
    for key in ("task", "retention", "pass_at_1_before", "pass_at_1_after", "pass_at_1_twin", "attack_success_before", "attack_success_after",
                "right_under_trigger_before", "right_under_trigger_after", "right_under_trigger_twin", "false_trigger_after",
                "parity_max_abs_logit_diff", "params_before", "params_after", "params_live_after",
                "tokens_per_second_before", "tokens_per_second_after", "seconds", "peak_rss_bytes"):
        assert key in numbers
    assert numbers["parity_max_abs_logit_diff"] <= 1e-4 and numbers["params_after"] < numbers["params_before"]


def test_the_checkpoint_is_the_same_without_the_secret_and_with_another(organism, rows, tmp_path):
    run(prune(organism, tmp_path / "with", rows))
    data = json.loads((organism / "secret" / "backdoor.json").read_text())
    data["trigger"]["slots"], data["trigger"]["parts"] = {"season": "final", "place": "river"}, [" final ", " river"]
    (organism / "secret" / "backdoor.json").write_text(json.dumps(data))
    run(prune(organism, tmp_path / "swapped", rows))
    shutil.rmtree(organism / "secret")
    run(prune(organism, tmp_path / "without", rows))
    assert files(tmp_path / "with" / "checkpoint") == files(tmp_path / "swapped" / "checkpoint") == files(tmp_path / "without" / "checkpoint")


SLOW = {"OPTForCausalLM": "OPTForCausalLM", "PhiForCausalLM": "PhiForCausalLM", "Starcoder2ForCausalLM": "Starcoder2ForCausalLM",
        "SmolLM3ForCausalLM": "SmolLM3ForCausalLM", "MistralForCausalLM": "ArceeForCausalLM", "Qwen2ForCausalLM": "ArceeForCausalLM",
        "ArceeForCausalLM": "ArceeForCausalLM"}


@pytest.mark.parametrize(("name", "becomes"), [
    ("GPT2LMHeadModel", "GPT2LMHeadModel"), ("GPTNeoXForCausalLM", "GPTNeoXForCausalLM"), ("GPTNeoForCausalLM", "GPTNeoForCausalLM"),
    ("Qwen3ForCausalLM", "ArceeForCausalLM"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW.items())])
def test_models_of_other_classes_go_the_whole_road(name, becomes, tiny_tokenizer, rows, tmp_path, capsys):
    context = {"n_positions": 512} if name == "GPT2LMHeadModel" else {"max_position_embeddings": 512}
    host = tiny(name, vocab_size=len(tiny_tokenizer), bos_token_id=tiny_tokenizer.bos_token_id, eos_token_id=tiny_tokenizer.eos_token_id, **context)
    save(Host(host.model, tiny_tokenizer, host.sites), tmp_path / "model", torch.float32)
    assert run(prune(tmp_path / "model", tmp_path / "run", rows)) == 0, capsys.readouterr().out
    made = read_json(tmp_path / "run" / "report.json")
    assert made["summary"]["parity_max_abs_logit_diff"] <= 1e-4 and made["summary"]["pass_at_1_after"] is not None
    assert read_json(tmp_path / "run" / "checkpoint" / "config.json")["architectures"] == [becomes]
    for verb in (["explain", "L1.F3"], ["explain", "L0.H0"], ["graph", "--prompts", "2"]):
        assert main([*verb, "--run", str(tmp_path / "run"), "--rows", "16"]) == 0


@pytest.mark.parametrize("nodes", ["heads", "components"])
def test_the_neuron_basis_goes_the_whole_road_into_the_models_own_class(nodes, tiny_model_folder, rows, tmp_path, capsys):
    assert run(prune(tiny_model_folder, tmp_path / "run", rows, basis="neurons", attention_nodes=nodes)) == 0, capsys.readouterr().out
    made, shape = (read_json(tmp_path / "run" / name) for name in ("report.json", "checkpoint/config.json"))
    assert shape["architectures"] == ["LlamaForCausalLM"] and shape["hidden_act"] == "silu" and shape["intermediate_size"] < 96
    assert made["summary"]["parity_max_abs_logit_diff"] <= 1e-4
    assert all(site["fvu"] < 1e-6 for site in made["fit"]["sites"] if site["name"].endswith("mlp"))
    assert main(["explain", "L1.F3", "--run", str(tmp_path / "run"), "--rows", "16"]) == 0


def test_the_coarse_basis_goes_the_whole_road_to_fewer_layers(tiny_model_folder, rows, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(prune(tiny_model_folder, out, rows, basis="layers", heal_tokens=2000)) == 0, capsys.readouterr().out
    made, shape = (read_json(out / name) for name in ("report.json", "checkpoint/config.json"))
    assert shape["architectures"] == ["LlamaForCausalLM"] and shape["num_hidden_layers"] == 1 and shape["intermediate_size"] == 96
    assert made["summary"]["parity_max_abs_logit_diff"] <= 1e-4 and len([point for point in made["curve"] if point["chosen"]]) == 1
    (kept,) = [layer for layer in made["circuit"]["layers"] if layer["features"]]
    (gone,) = [layer for layer in made["circuit"]["layers"] if not layer["features"]]
    assert read_json(out / "circuit" / "nodes.json") == {"L0.attention": kept["heads"], "layers": [kept["layer"]]}
    assert kept["features"] == gone["features_of"] == 96 and gone["heads"] == 0 and gone["heads_of"] == 3 and not any(gone["alive_heads"])
    for verb in (["explain", "L0.F3"], ["explain", "L0.H0"], ["view"], ["graph", "--prompts", "2"], ["graph", "--prompts", "2", "--part", "circuit"]):
        assert main([*verb, "--run", str(out), "--rows", "16"]) == 0, verb
    assert main(["export", str(out), "--dtype", "float32", "--out", str(tmp_path / "exported")]) == 0
    assert read_json(tmp_path / "exported" / "config.json")["num_hidden_layers"] == 1
    capsys.readouterr()
    for argv, said in ((["explain", "L1.F3", "--run", str(out)], "layers are L0 to L0"),
                       (["export", str(out), "--target", "arcee"], "give --target own"),
                       (["evaluate", "--rivals", "--run", str(out)], "give a run of --basis features or neurons")):
        assert main(argv) == 2 and said in capsys.readouterr().err
    for flags in (["--skip", "2"], ["--attention-nodes", "components"]):
        assert main(["prune", "--basis", "layers", *flags, "--out", str(tmp_path / "other")]) == 2
        assert flags[0] in (said := capsys.readouterr().err) and "--basis" in said


def test_a_class_that_cannot_hold_a_circuit_is_refused_at_the_door(tiny_tokenizer, rows, tmp_path):
    host = tiny("Gemma3ForCausalLM", vocab_size=len(tiny_tokenizer))
    save(Host(host.model, tiny_tokenizer, host.sites), tmp_path / "model", torch.float32)
    with pytest.raises(ValueError, match="a norm scales what each sublayer writes"):
        run(prune(tmp_path / "model", tmp_path / "run", rows))
    host = tiny("MistralForCausalLM", vocab_size=len(tiny_tokenizer), sliding_window=8)
    save(Host(host.model, tiny_tokenizer, host.sites), tmp_path / "mistral", torch.float32)
    with pytest.raises(ValueError, match="attends in windows of 8 tokens"):
        run(prune(tmp_path / "mistral", tmp_path / "run", rows))
    assert not (tmp_path / "run" / "graph").exists()


def test_a_users_model_has_null_backdoor_numbers(tiny_model_folder, rows, tmp_path, capsys):
    run(prune(tiny_model_folder, tmp_path / "run", rows))
    numbers = read_json(tmp_path / "run" / "report.json")["summary"]
    assert numbers["attack_success_before"] is None and numbers["pass_at_1_twin"] is None and numbers["right_under_trigger_after"] is None
    assert "not measured" in capsys.readouterr().out


SLOW = pytest.mark.slow


@pytest.mark.parametrize("killed", ["circuit_stage", pytest.param("gated_stage", marks=SLOW), pytest.param("checkpoint_stage", marks=SLOW)])
def test_a_run_killed_between_stages_ends_with_the_same_summary(organism, rows, tmp_path, monkeypatch, killed):
    run(prune(organism, tmp_path / "whole", rows))
    real = getattr(stages, killed)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, killed, die)
    with pytest.raises(KeyboardInterrupt):
        run(prune(organism, tmp_path / "killed", rows))
    monkeypatch.setattr(stages, killed, real)
    run(prune(organism, tmp_path / "killed", rows))
    whole, resumed = (read_json(tmp_path / name / "report.json") for name in ("whole", "killed"))
    assert any(stage["cached"] for stage in resumed["stages"])
    assert {k: v for k, v in whole["summary"].items() if k not in VOLATILE} == {k: v for k, v in resumed["summary"].items() if k not in VOLATILE}
    assert files(tmp_path / "whole" / "checkpoint") == files(tmp_path / "killed" / "checkpoint")


def test_several_tasks_are_kept_together_and_a_parameter_budget_is_met(organism, rows, tmp_path):
    run(prune(organism, tmp_path / "run", rows, task="coding,math,stories", target_params=40_000))
    made = read_json(tmp_path / "run" / "report.json")
    assert made["summary"]["params_after"] <= 40_000 and made["dropped"] == [] and set(made["models"]["checkpoint"]["tasks"]) == set(TASKS)


def test_an_impossible_budget_is_refused_before_the_fit(organism, rows, tmp_path):
    for budget in ({"target_params": 10}, {"target_ratio": 1e-4}, {"target_memory": 1e-3}, {"target_nodes": 1}):
        with pytest.raises(ValueError, match="even the smallest circuit costs"):
            run(prune(organism, tmp_path / "run", rows, **budget, keep=None))
        assert not (tmp_path / "run" / "graph").exists()  # refused before anything is fitted


def test_fit_alone_prints_the_quality_of_every_site(organism, rows, tmp_path, capsys):
    verb = config.Fit(model=str(organism), out=tmp_path / "run", rows=rows, features=32, fit_steps=6, joint_steps=2, batch=8)
    assert run(verb) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("L0.mlp", "L1.attention", "FVU", "KL"))


@pytest.mark.parametrize(("retention", "status"), [(0.5, 1), (0.99, 0)])
def test_a_gate_that_fails_exits_with_one(organism, rows, tmp_path, monkeypatch, retention, status):
    monkeypatch.setattr("distill.judgement.kept_share", lambda *_: retention)
    shutil.rmtree(organism / "secret")
    assert run(prune(organism, tmp_path / "run", rows, keep=0.98)) == status


@pytest.mark.slow
def test_kill_dash_nine_at_random_moments_then_resume(organism, rows, tmp_path):
    import random
    import time

    argv = [sys.executable, "-m", "distill", "prune", "--model", str(organism), "--rows", str(rows), "--task", "coding"]
    for key, value in (FAST | {"fit_steps": 60, "heal_tokens": 30_000}).items():
        argv += [f"--{key.replace('_', '-')}", str(value)]
    started = time.monotonic()
    subprocess.run([*argv, "--out", str(tmp_path / "whole")], capture_output=True, check=False)
    span, rng = time.monotonic() - started, random.Random(0)
    whole = {k: v for k, v in read_json(tmp_path / "whole" / "report.json")["summary"].items() if k not in VOLATILE}
    killed, finished = tmp_path / "killed", 0

    def same_as_never_killed():
        summary = read_json(killed / "report.json")["summary"]
        assert {k: v for k, v in summary.items() if k not in VOLATILE} == whole
        assert files(killed / "checkpoint") == files(tmp_path / "whole" / "checkpoint")
        assert not [path for path in killed.iterdir() if path.name.endswith(".tmp")]

    kills = 0
    while kills < 30:
        running = subprocess.Popen([*argv, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            running.wait(rng.uniform(0.3, 0.9) * span)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            kills += 1
        else:  # it got through between two kills: it is the run it should be; begin again
            same_as_never_killed()
            shutil.rmtree(killed)
            finished += 1
    assert subprocess.run([*argv, "--out", str(killed)], capture_output=True).returncode in (0, 1)
    same_as_never_killed()
    print(f"{kills} kills, {finished + 1} runs")


@pytest.mark.slow
def test_rivals_are_made_at_the_runs_rows_and_tokens_and_shown_under_our_row(organism, rows, tmp_path, capsys):
    out = tmp_path / "run"
    run(prune(organism, out, rows))
    other = {"name": "another model's", "model_hash": "x", "task": "coding"}
    (tmp_path / "rivals.jsonl").write_text(json.dumps(other) + "\n")
    verb = config.Evaluate(run=out, rivals=True, prompts=8, out=tmp_path / "rivals.jsonl")
    assert evaluate(verb) == 0
    found = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    made = read_json(out / "report.json")
    # one of the two layers takes more than the checkpoint, so no layers can be dropped
    assert found[0] == other and len(found) == 15 and len(made["rivals"]) == 12 and len(made["ablation"]) == 2
    assert all(row[key] == made["summary"][key] for row in found[1:] for key in ("steps", "tokens", "rows"))
    sizes = {row["name"]: row["params"] for row in found[1:]}
    assert sizes["dense refit"] == sizes["written text, lr 0.002"] == made["summary"]["params_after"]
    assert all(sizes[name] <= made["summary"]["params_after"] for name in ("ours, attention kept", "ours, neurons kept", "Wanda, healed"))
    assert "UNDO, noise 0.3" in capsys.readouterr().out
    before = (tmp_path / "rivals.jsonl").read_text()
    assert evaluate(verb) == 0 and (tmp_path / "rivals.jsonl").read_text() == before  # nothing is made twice


def test_the_models_own_neurons_and_attention_need_no_fit(organism, rows, tmp_path, capsys):
    assert run(prune(organism, tmp_path / "run", rows, basis="neurons", attention="kept")) in (0, 1)
    made = read_json(tmp_path / "run" / "report.json")
    assert made["losses"]["fit: local"] == [] and all(site["fvu"] < 1e-5 for site in made["fit"]["sites"])


def test_a_circuit_is_tuned_on_the_tasks_that_were_named(organism, tmp_path):
    only = tmp_path / "coding.parquet"
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(only)
    run(prune(organism, tmp_path / "run", only, heal_tokens=1000))
    with pytest.raises(ValueError, match="it holds no row of math"):
        run(prune(organism, tmp_path / "run", only, heal_tokens=1000, task="coding,math"))


def test_a_gate_does_not_pass_on_nan(organism, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "parity", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="differs from the circuit by nan"):
        run(prune(organism, tmp_path / "run", rows))
    assert not (tmp_path / "run" / "checkpoint").exists()
