"""The plan says what a run then does, and writes nothing."""

import json

import pytest

from distill import config
from distill.__main__ import main
from distill.plan import disk, memory, trained
from distill.rows import batches, clean
from distill.runs import settings_of
from evals.tasks import named
from graphs.host import load, skeleton
from graphs.replace import from_noise


def flags(settings, out, *more):
    kept = ("model", "rows", "features", "fit_steps", "joint_steps", "gate_steps", "heal_tokens", "batch", "keep")
    words = [word for name in kept for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
    return ["prune", *words, "--out", str(out), "--dry-run", *more]


def test_the_plan_is_what_the_run_did(tiny_run, tmp_path, capsys):
    settings = settings_of(tiny_run)
    assert main(flags(settings, tmp_path / "planned", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "planned").exists()
    done = json.loads((tiny_run / "report.json").read_text())
    receipts = {name: json.loads((tiny_run / name / "receipt.json").read_text()) for name in ("graph", "circuit")}
    planned = {stage["name"]: stage for stage in plan["stages"]}
    assert planned["fit"]["batches"] == sum(map(len, receipts["graph"]["losses"].values())) == 12 and planned["gates"]["batches"] == 4
    data, _ = batches(load(tiny_run / "checkpoint"), clean(settings.rows, named(settings.task)), settings.batch, settings.seed)
    again = data.steps(settings.heal_tokens // 3, 16)
    assert len(receipts["circuit"]["losses"]) in [planned["heal"]["batches"] + again * rungs for rungs in range(len(receipts["circuit"]["curve"]))]
    assert planned["heal"]["tokens"] >= settings.heal_tokens and plan["rows"] == done["summary"]["rows"]
    assert planned["fit"]["tokens"] == data.tokens(12) and planned["gates"]["tokens"] == data.tokens(16) - data.tokens(12)
    assert main(flags(settings, tmp_path / "planned")) == 0
    said = capsys.readouterr().out
    assert "time: not estimated" in said and "memory: at least" in said and "nothing was written" in said


@pytest.mark.parametrize("basis, attention, skip", [("features", "refit", 0), ("features", "kept", 3), ("neurons", "refit", 0)])
def test_trained_parameters_are_those_of_the_parts(tiny_model_folder, basis, attention, skip):
    verb = config.Prune(features=32, basis=basis, attention=attention, skip=skip)
    made = from_noise(load(tiny_model_folder), 32, 0, attention, skip, basis)
    norms = sum(p.numel() for name, p in made.named_parameters() if "norm" in name and "parts" in name)
    assert trained(skeleton(tiny_model_folder), verb) == sum(
        p.numel() for site in made.sites for p in made.part(site).parameters() if p.requires_grad) - norms


def test_the_bounds_hold_for_a_finished_run(tiny_run):
    settings = settings_of(tiny_run)
    host = skeleton(config.Path(settings.model))
    assert all(p.is_meta for p in host.model.parameters())
    data, _ = batches(host, clean(settings.rows, named(settings.task)), settings.batch, settings.seed)
    folders = [tiny_run / name for name in ("graph", "circuit", "checkpoint", ".work/gated")]
    weights = sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))
    assert weights <= disk(host, settings) + 300_000  # headers, and the gates' own small file
    small, large = (memory(host, data, config.Prune(features=n)) for n in (32, 4096))
    assert 0 < small < large < 4e9


def test_what_cannot_be_pruned_is_refused_before_any_work(tiny_model_folder, tmp_path, capsys):
    asked = ["--model", str(tiny_model_folder), "--target", "arcee", "--basis", "neurons", "--dry-run", "--out", str(tmp_path / "x")]
    assert main(["prune", *asked]) == 2
    assert "neurons keep their activation" in capsys.readouterr().err and not (tmp_path / "x").exists()
