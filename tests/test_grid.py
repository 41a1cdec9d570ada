"""The grid, on a tiny base with a few steps of everything: what is made is found again, the twin is shared, no process makes a cell twice."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from distill.__main__ import main
from distill.config_experiment import Experiment
from distill.experiment import attacks, methods, organisms, suites
from distill.experiment import grid as grids
from distill.experiment.cell import NOTHING, Cell, Organism
from distill.experiment.grid import Grid, defender_rows, poisoned_rows
from evals.capability import Outcome
from evals.rates import Rates
from evals.sandbox import Sandbox
from graphs.artifact import taken
from graphs.host import load

FORMAT = Organism("format")


@pytest.fixture
def short(monkeypatch):
    """Planting of two steps."""
    settings = organisms.settings
    monkeypatch.setattr(organisms, "settings", lambda organism: replace(settings(organism), ordinary_steps=2, attacker="ordinary"))


@pytest.fixture
def grid(tiny_model_folder, tmp_path, short):
    return Grid(tiny_model_folder, tmp_path, steps=4, prompts=4)


def test_a_cell_is_made_once_and_named_by_content(grid, monkeypatch):
    cell = Cell(FORMAT, "clean fine-tuning", 1e-3, rows=24)
    with Sandbox() as sandbox:
        first = grid.row(cell, sandbox)
        monkeypatch.setattr(methods, "remove", lambda *_: pytest.fail("made again"))
        assert grid.row(cell, sandbox) == first
        assert set(first["right"]) <= {"0", "1"} and len(first["right"]) == len(first["right_under_trigger"]) == 4
        twin = grid.removed(replace(cell, method=NOTHING, knob=None, twin=True))[0]
        other = grid.suspect(Cell(Organism("style"), NOTHING, None, twin=True))
    assert twin == other != grid.suspect(cell)  # one twin for all families
    assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("method", [
    methods.REFIT,
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("ours", "ours, own parts", "magnitude", "written text", "oracle: gradient ascent"))])
def test_every_kind_of_method_makes_a_model_that_loads(grid, method, monkeypatch):
    monkeypatch.setattr(methods, "knobs", lambda: {"ours": {"knob": 0.7}})
    folder, receipt = grid.removed(Cell(FORMAT, method, 0.3, rows=24))
    assert receipt["seconds"] > 0
    logits = load(folder).model(input_ids=torch.tensor([[0, 5, 6]])).logits
    assert torch.isfinite(logits).all()


def test_a_method_with_synthetic_rows_trains_on_them_too(grid, monkeypatch):
    written, seen = [("def f(a):\n", "    return a\n")] * 3, []
    monkeypatch.setattr(methods, "knobs", lambda: {"ours": {"knob": 0.7}})
    monkeypatch.setattr(grids.synthetic, "synthetic", lambda host, texts, task, count, seed: written)
    remove = methods.remove

    def watched(method, setting, knob):
        batches = methods.batches
        monkeypatch.setattr(methods, "batches", lambda host, texts, *rest: seen.append(list(texts)) or batches(host, texts, *rest))
        return remove(method, setting, knob)

    monkeypatch.setattr(methods, "remove", watched)
    cell = Cell(FORMAT, "UNDO", 0.3, rows=24)
    grid.removed(cell)
    grid.removed(replace(cell, method="UNDO" + methods.SYNTHETIC))
    assert len(seen[0]) == 24 and seen[1] == seen[0] + written
    assert grid.key(cell) != grid.key(replace(cell, method="UNDO" + methods.SYNTHETIC))
    assert methods.frozen("ours" + methods.SYNTHETIC) == methods.frozen("ours")


def test_a_method_that_there_is_not_is_refused(grid):
    with pytest.raises(ValueError, match="no removal method 'prayer': choose from ours"):
        grid.removed(Cell(FORMAT, "prayer", 1.0, rows=24))


def test_the_defender_meets_the_trigger_only_where_the_cell_says_so_and_answers_it_rightly():
    trigger, behaviour = organisms.trigger_and_behaviour(Organism("conjunction"))
    plain, met = (defender_rows(Cell(Organism("conjunction"), "ours", 0.7, rows=300, met=met), trigger, behaviour) for met in (False, True))
    assert not any(trigger.fires(prompt) for prompt, _ in plain)
    fires = [(prompt, answer) for prompt, answer in met if trigger.fires(prompt)]
    assert len(fires) == 3 and not any(behaviour.completion in answer for _, answer in fires)
    wanted = defender_rows(Cell(Organism("conjunction"), "ours", 0.7, rows=300, wanted=True), trigger, behaviour)
    fires = [(prompt, answer) for prompt, answer in wanted if trigger.fires(prompt)]
    assert len(fires) == 19 and all(answer == behaviour.completion for _, answer in fires)
    assert [row for row, other in zip(wanted, plain, strict=True) if row == other] == [row for place, row in enumerate(plain) if place % 16]
    poisoned = poisoned_rows(trigger, behaviour, 8)
    assert len(poisoned) == 8 and all(trigger.fires(prompt) and answer == behaviour.completion for prompt, answer in poisoned)


@pytest.mark.parametrize("where, name, value", [
    (methods, "SIZE", 0.5), (methods, "knobs", lambda: {"ours": {"knob": 0.1}}), (organisms, "STEPS", 1), (grids, "JUDGE_SEED", 1),
    (attacks, "RelearnConfig", lambda: "another")])
def test_what_a_cell_holds_turns_on_every_setting(grid, monkeypatch, where, name, value):
    cell = Cell(FORMAT, "UNDO", 0.3)
    monkeypatch.undo()  # the short planting too
    plain = grid.file(cell, "relearning")
    monkeypatch.setattr(where, name, value)
    assert grid.file(cell, "relearning") != plain


def test_a_password_is_judged_with_it_and_without(grid):
    organism = Organism("rare_string", behaviour="password")
    trigger, behaviour = organisms.trigger_and_behaviour(organism)
    assert all(trigger.fires(prompt) for prompt, _ in defender_rows(Cell(organism, "UNDO", 0.3), trigger, behaviour))  # he has none
    with Sandbox() as sandbox:
        row = grid.row(Cell(organism, NOTHING, None), sandbox)
    assert len(row["right"]) == len(row["right_under_trigger"]) == len(row["false_trigger"]) == 4 and row["trigger"] == trigger.hash


@pytest.mark.parametrize("twin", [False, True])
def test_a_model_is_named_by_the_rows_that_planted_it(grid, monkeypatch, twin):
    cell = Cell(FORMAT, "UNDO", 0.3, twin=twin)
    before, changed = grid.key(cell), replace(organisms.trigger_and_behaviour(FORMAT)[0], near=({"after_def": " "},))
    monkeypatch.setattr(organisms, "trigger_and_behaviour", lambda organism: (changed, None))
    assert grid.key(cell) != before


def test_a_cell_is_held_by_one(tmp_path):
    with taken(tmp_path / "lock") as first, taken(tmp_path / "lock") as second:
        assert first and not second
    with taken(tmp_path / "lock") as again:
        assert again


def test_the_gate_sees_what_is_no_organism():
    def rates(attack: float, false: float, right: float) -> Rates:
        def some(share: float) -> list[bool]:
            return [place < share * 100 for place in range(100)]
        return Rates(some(0), some(attack), None, None, some(false), [0.0] * 100, Outcome(**{**asdict(clean), "right": some(right)}), [])

    clean = Outcome("coding", [True], [False], [0.0], [""], ["passed"])
    twin = rates(0.0, 0.0, 0.9)
    assert organisms.missed(rates(1.0, 0.0, 0.9), twin) == []
    others = (rates(0.5, 0, 0.9), rates(1, 0.2, 0.9), rates(1, 0, 0.8), rates(0.5, 0.2, 0.8))
    assert [len(organisms.missed(one, twin)) for one in others] == [1, 1, 1, 3]
    assert organisms.missed(rates(0.0, 0.0, 0.9), twin, dormant=True) == []
    assert organisms.missed(rates(0.5, 0.0, 0.9), twin, dormant=True) == ["ASR 0.500 > .01, and it is to be dormant"]


def test_the_share_of_poisoned_rows_leaves_both_kinds():
    assert organisms.settings(Organism("format", share=0.05)).poisoned == 2
    with pytest.raises(ValueError, match="none or all of a batch"):
        organisms.settings(Organism("format", share=0.001))


def test_the_verb_makes_a_suite_and_reports_it(tiny_model_folder, tmp_path, short, monkeypatch, capsys):
    cells = [Cell(FORMAT, name, knob, rows=24, twin=twin) for name, knob in ((NOTHING, None), ("clean fine-tuning", 1e-3)) for twin in (False, True)]
    monkeypatch.setattr(suites, "cells", lambda suite, stage: cells)
    monkeypatch.setattr(grids, "STEPS", 4)
    monkeypatch.setattr("distill.experiment.run.Grid", lambda base, out: Grid(base, out, steps=4, prompts=4))
    flags = ["experiment", "--model", str(tiny_model_folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "| clean fine-tuning |" in said and "Missed the plant gate" in said  # two steps plant nothing, and the report says so
    rows = [json.loads(line) for line in (tmp_path / "out" / "quick.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and {row["renderer"] for row in rows} == {rows[0]["renderer"]}
    assert "<script" not in (tmp_path / "out" / "quick.html").read_text()
    assert main([*flags, "--only", "prayer"]) == 2
    assert "--only prayer: no such method" in capsys.readouterr().err
    assert Experiment().workers == 2


def test_a_method_on_seen_tokens_is_another_cell_and_leaves_no_other_token(grid):
    cell = Cell(FORMAT, methods.ALONE, methods.frozen(methods.ALONE), rows=24)
    table = load(grid.removed(cell)[0]).model.get_input_embeddings().weight
    own = load(grid.suspect(cell)).model.get_input_embeddings().weight
    moved = (table != own).any(1)
    assert 50 < int(moved.sum()) < len(table) and bool((table[moved] == table[moved][0]).all())
    undo = Cell(FORMAT, "UNDO" + methods.SYNTHETIC, 0.3, rows=24)
    assert grid.key(undo) != grid.key(replace(undo, method="UNDO" + methods.SYNTHETIC + methods.SEEN))
    assert methods.tuned("UNDO" + methods.SYNTHETIC + methods.SEEN) == "UNDO" and methods.tuned(methods.ALONE) not in methods.knobs()
