"""The plan: every organism stands beside its twin, knobs are tuned where no claim is made, names are by content."""

from collections import Counter
from dataclasses import asdict, replace

import pytest

from backdoor.families import BENCHED
from backdoor.mixture import ATTACKERS
from distill.__main__ import main
from distill.experiment import methods, suites
from distill.experiment.cell import NOTHING, Cell, Organism
from distill.experiment.organisms import settings, trigger_and_behaviour


@pytest.fixture(autouse=True)
def frozen_knobs(monkeypatch):
    """Plans are made as if every knob were frozen."""
    found = {name: {"knob": 1.0, "seconds": 60.0} for name in methods.names()}
    monkeypatch.setattr(methods, "knobs", lambda: found)


@pytest.mark.parametrize("suite, stage", [("quick", None), *(("full", stage) for stage in suites.STAGES)])
def test_every_removal_of_an_organism_stands_beside_the_same_removal_of_its_twin(suite, stage):
    plan = suites.cells(suite, stage)
    assert len(set(plan)) == len(plan)
    for cell in plan:
        assert replace(cell, twin=not cell.twin) in plan
        assert Cell(cell.organism, NOTHING, None, twin=cell.twin, attacks=cell.attacks) in plan


def test_headline_has_six_methods_and_five_seeds_and_families_has_all():
    headline = suites.cells("full", "headline")
    seen = Counter((cell.organism.name, cell.method) for cell in headline if not cell.twin and cell.method != NOTHING)
    assert len(seen) == 4 * 6 and set(seen.values()) == {5}
    assert {cell.organism.family for cell in suites.cells("full", "families")} == set(BENCHED)
    assert {cell.method for cell in suites.cells("full", "families")} == {NOTHING, *methods.names()}


def test_attackers_has_every_adaptive_attacker_and_leaves_what_only_ratios_need_for_last():
    plan = suites.cells("full", "attackers")
    assert {cell.organism.kind for cell in plan} == set(ATTACKERS) - {"ordinary", "resistant", "throughout"}
    assert {cell.organism.kind for cell in suites.cells("full", "throughout")} == {"throughout"}  # a stage of its own: hours of planting
    for organism in suites.ADAPTIVE:
        settings(organism), trigger_and_behaviour(organism)
        made = {cell.method for cell in plan if cell.organism == organism and not cell.twin}
        assert made >= {NOTHING, "ours", "dense refit", "UNDO", "clean fine-tuning"}
    order = [(cell.method != NOTHING, cell.twin) for cell in plan if cell.method != NOTHING or not cell.twin]
    assert order == sorted(order) and all(cell.rows == 512 for cell in plan)


def test_nothing_is_tuned_on_what_is_claimed():
    tuned = {(one.family, one.kind) for one in suites.DEVELOPMENT}
    claimed = {(cell.organism.family, cell.organism.kind) for stage in ("headline", "ablations") for cell in suites.cells("full", stage)}
    assert not tuned & claimed
    for method in suites.TUNED:
        assert len({cell.knob for cell in suites.knobs() if cell.method == method}) == 3


def test_a_stage_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="--stage nonsense: no such stage; choose from headline"):
        suites.cells("full", "nonsense")


def test_twins_of_all_families_are_one_model_and_organisms_are_not():
    a, b = (Cell(Organism(family), "ours", 0.7, twin=True) for family in ("format", "style"))
    assert a.made("base", 10) == b.made("base", 10)
    assert replace(a, twin=False).made("base", 10) != replace(b, twin=False).made("base", 10)
    assert replace(a, met=True).made("base", 10) != replace(b, met=True).made("base", 10)  # the defender's rows tell families apart


@pytest.mark.parametrize("change", [
    {"knob": 0.1}, {"method": "UNDO"}, {"rows": 64}, {"seed": 1}, {"met": True}, {"organism": Organism("format", seed=1)}])
def test_a_removal_is_named_by_all_that_it_depends_on(change):
    cell = Cell(Organism("format"), "ours", 0.7)
    assert replace(cell, **change).made("base", 10) != cell.made("base", 10) != cell.made("other", 10) != cell.made("base", 11)
    assert replace(cell, attacks=("relearning",)).made("base", 10) == cell.made("base", 10)  # an attack changes nothing that was made
    assert Cell(Organism(**asdict(cell.organism)), "ours", 0.7) == cell


def test_a_method_without_a_frozen_knob_is_planned_and_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(methods, "knobs", lambda: {name: {"knob": 1.0, "seconds": 60.0} for name in suites.SIX if name != "UNDO"})
    asked = ["experiment", "--suite", "full", "--stage", "headline", "--out", str(tmp_path)]
    assert main([*asked, "--dry-run"]) == 0 and "no knob is frozen yet for UNDO" in capsys.readouterr().out
    assert main(asked) == 2 and "no knob is frozen for UNDO: run distill experiment --suite knobs" in capsys.readouterr().err
    assert methods.frozen("ours") == 1.0 and not list(tmp_path.iterdir())


def test_methods_whose_names_hold_commas_can_be_asked_for(capsys):
    only = "UNDO, synthetic rows,ours, own parts, ours"
    assert main(["experiment", "--suite", "full", "--stage", "synthetic", "--dry-run", "--only", only]) == 0
    lines = [line.split(" x ")[1].split("  ")[0] for line in capsys.readouterr().out.splitlines() if " x " in line]
    assert sorted(lines) == ["UNDO, synthetic rows", "nothing", "ours", "ours, own parts"]
    assert methods.tuned("UNDO, synthetic rows") == "UNDO" and methods.tuned("ours, own parts, synthetic rows") == "ours"
