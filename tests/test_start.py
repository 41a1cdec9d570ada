"""A run that starts from another: what is taken over, what is refused, and that the other stays as it was."""

from __future__ import annotations

import shutil

import pytest
import torch

from distill import config
from distill.prune import run
from graphs.artifact import read_json, write_json
from tests.test_run import files, prune, rows  # noqa: F401  # a fixture


@pytest.fixture
def first(tiny_model_folder, rows, tmp_path):  # noqa: F811
    run(prune(tiny_model_folder, tmp_path / "first", rows, keep=None, target_ratio=0.8, features=96))
    return tmp_path / "first"


def again(first, **changes) -> config.Prune:
    small = {"target_ratio": 0.4, "heal_tokens": 1000, "tune_rows": 4, "prompts": 8}
    return config.Prune(**{"start": first, "out": first.parent / "second"} | small | changes)


def test_the_circuit_is_pruned_further_and_nothing_is_fitted_again(first, capsys, monkeypatch):
    before = files(first)
    monkeypatch.setattr("distill.stages.measure", lambda *_: pytest.fail("what the model does on tune is known"))
    assert run(again(first)) == 0, capsys.readouterr().out
    made, large = read_json(first.parent / "second" / "report.json"), read_json(first / "report.json")
    assert {stage["name"]: stage["cached"] for stage in made["stages"]} == {
        "fit": True, "gates": True, "heal": False, "compile": False, "evaluate": False}
    assert made["summary"]["params_after"] <= 0.4 * made["summary"]["params_before"] < large["summary"]["params_after"]
    inner, outer = (read_json(folder / "circuit" / "receipt.json")["kept"] for folder in (first.parent / "second", first))
    assert all(set(inner[name]) < set(outer[name]) for name in outer if name.endswith("mlp"))
    assert made["losses"]["heal"][: len(large["losses"]["heal"])] == large["losses"]["heal"]
    assert made["summary"]["tokens"] > large["summary"]["tokens"]  # what the first run trained on is counted
    assert files(first) == before
    assert files(first.parent / "second" / "graph") == files(first / "graph")


@pytest.mark.slow
def test_another_start_into_the_same_folder_brings_its_own_graph(first, tiny_model_folder, rows):  # noqa: F811
    run(again(first))
    run(prune(tiny_model_folder, first.parent / "other", rows, keep=None, target_ratio=0.8, features=96, seed=1))
    run(again(first, start=first.parent / "other"))
    made = read_json(first.parent / "second" / "report.json")
    assert [stage["cached"] for stage in made["stages"][:2]] == [True, True]
    assert files(first.parent / "second" / "graph") == files(first.parent / "other" / "graph") != files(first / "graph")


def test_no_healing_leaves_what_was_healed_before(first):
    run(again(first, heal_tokens=0))
    made = read_json(first.parent / "second" / "report.json")
    assert made["losses"]["heal"] == read_json(first / "report.json")["losses"]["heal"]
    assert made["kl"]["pruned"] == pytest.approx(made["kl"]["healed"])


def test_a_cut_that_costs_next_to_nothing_is_healed_only_where_tokens_were_asked_for(first, monkeypatch):
    monkeypatch.setattr("distill.search.NEAR", 1e9)
    before = len(read_json(first / "report.json")["losses"]["heal"])
    for tokens, name in ((None, "near"), (1000, "asked")):
        run(again(first, heal_tokens=tokens, out=first.parent / name))
    near, asked = (read_json(first.parent / name / "report.json") for name in ("near", "asked"))
    assert len(near["losses"]["heal"]) == before < len(asked["losses"]["heal"])
    assert near["kl"]["pruned"] == near["kl"]["healed"] and asked["kl"]["pruned"] != asked["kl"]["healed"]


def test_settings_are_those_of_the_other_run(first):
    run(again(first))
    config_of = [read_json(folder / "receipt.json")["config"] for folder in (first, first.parent / "second")]
    assert all(config_of[0][name] == config_of[1][name] for name in ("model", "rows", "features", "fit_steps", "batch"))


def test_what_cannot_be_taken_over_is_refused(first):
    for changes, said in (({"target_ratio": 0.9}, "within the budget already"), ({"features": 64}, "--features 64: the run to start from has 96"),
                          ({"out": first}, "own folder"), ({"start": first.parent / "none"}, "--start .*none: no such folder")):
        with pytest.raises(ValueError, match=said):
            run(again(first, **changes))
    made = read_json(first / "receipt.json")
    write_json(first / "receipt.json", made | {"config": made["config"] | {"synthetic_rows": 8}})
    with pytest.raises(ValueError, match="--heal-answers does not go with --synthetic-rows"):
        run(again(first, heal_answers=0.5))
    shutil.rmtree(first / ".work" / "gated")
    with pytest.raises(ValueError, match="its gates are gone"):
        run(again(first))


def test_a_share_that_no_smaller_rung_keeps_leaves_the_circuit_as_it_is(first):
    run(again(first, target_ratio=None, keep=2.0))
    inner, outer = (read_json(folder / "circuit" / "receipt.json") for folder in (first.parent / "second", first))
    assert inner["kept"] == outer["kept"] and inner["size"] == outer["size"]
    assert torch.isfinite(torch.tensor(inner["losses"])).all()
