"""Understanding: exact shares that sum to v(all), shuffled hypotheses that score nothing, the verb, the gate and the regression test."""

import json
import shutil

import pytest
import torch

from distill.__main__ import main
from distill.config_hypotheses import Test as Verb
from distill.regress import rows as rows_of_test
from distill.runs import reopen
from distill.understand import page as lines_of
from graphs.artifact import read_json, write_json
from graphs.attention import standing_in
from graphs.edges import Reconstruction
from graphs.graph import index
from graphs.host import load, save
from graphs.hypotheses.holes import holes
from graphs.hypotheses.hypothesis import Hypothesis, Look
from graphs.hypotheses.proposals import fitted, tables
from graphs.hypotheses.study import watch
from graphs.hypotheses.substitution import means
from graphs.hypotheses.understanding import BUCKETS, GROUPS, NULL, Explained, Prompts, bucketed, score, shapley, understanding
from graphs.hypotheses.verdict import Evidence, Judged, Share
from graphs.hypotheses.views import Text
from tests.test_edges import neuron_basis, random_basis
from tests.test_hypotheses import rows, with_previous_token_head


def test_shares_of_a_toy_game_are_exact():
    glove = torch.tensor([float((one & 1) and (one & 6) > 0) for one in range(8)])  # one left glove, two right ones
    assert torch.allclose(shapley(glove), torch.tensor([2 / 3, 1 / 6, 1 / 6]))
    worth = torch.tensor([0.5, -1.0, 2.0, 0.0])
    sums = torch.tensor([float(sum(worth[p] for p in range(4) if one >> p & 1)) for one in range(16)])
    assert torch.allclose(shapley(sums), worth, atol=1e-6)
    game = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(shapley(game).sum(-1), game[:, -1] - game[:, 0])


@pytest.fixture(scope="module")
def explained():
    """The hand-built model with its known head and the first MLP's neurons as pairs of tokens."""
    host = with_previous_token_head()
    host.model.transformer.h[0].ln_2.weight.data[16:] = 0  # where positions are written
    subject = Reconstruction(host, neuron_basis(host))
    nodes, clean = index(host, subject.basis), [rows(seed, 32) for seed in range(2, 8)]
    for batch in clean:
        batch.ids.remainder_(8).add_(3)  # eight kinds of token: every pair is seen
    seen = watch(subject, nodes, clean, 0)
    accepted = [Hypothesis("L0.H0", Look({"previous": 30.0}))]
    pairs = [fitted(seen.texts, name) for name in ("pair", "token")]
    accepted += [Hypothesis(f"L0.F{node}", tables(pairs, seen.own["L0.mlp"][:, node : node + 1])) for node in range(subject.basis["L0.mlp"].count)]
    return Explained(subject, nodes, means(subject, clean), accepted)


def prompts_of(explained, added=None):
    found = []
    for seed in (20,):
        batch = rows(seed, 12)
        batch.ids.remainder_(8).add_(3)
        with torch.no_grad():
            found.append(Prompts(Text.of(batch, explained.nodes.tokens), explained.subject.host.model(input_ids=batch.ids).logits, added or {}))
    return found


def test_shares_sum_to_v_of_all_and_shuffled_hypotheses_score_nothing(explained):
    scored = score(explained, prompts_of(explained))
    found = understanding(scored)
    assert sum(share.value for share in found.shares.values()) == pytest.approx(found.whole.value, abs=1e-9)
    assert found.understood.value == pytest.approx(found.shares["code"].value + found.shares["equations"].value)
    assert found.shares["code"].value > 0.1 and found.whole.value > 0.95
    assert found.null.value <= NULL < found.shares["code"].low
    assert found.without["unexplained"].value > 0.5 and found.without["error"].value == pytest.approx(0, abs=1e-6)
    assert found.shares["equations"].value == found.shares["pruned"].value == 0  # nothing is in these groups
    assert found.whole.low <= found.whole.value <= found.whole.high
    assert understanding(scored, bucket=1) is None and understanding(scored, bucket=0).tokens == found.tokens == 12 * 15
    half = [understanding(scored, part) for part in (range(6), range(6, 12))]
    assert sum(one.nothing * one.tokens for one in half) == pytest.approx(found.nothing * found.tokens)


def test_without_hypotheses_nothing_is_understood_and_everything_is_there(explained):
    bare = Explained(explained.subject, explained.nodes, explained.means, [])
    found = understanding(score(bare, prompts_of(explained)))
    assert found.understood.value == found.null.value == 0 and found.whole.value == pytest.approx(1, abs=1e-5)


def test_errors_and_pruned_nodes_have_their_share():
    host = with_previous_token_head()
    basis = random_basis(host)
    subject = Reconstruction(host, basis, {site.name: standing_in(host.model, site) for site in host.sites[::2]})
    clean = [rows(seed) for seed in range(2, 5)]
    bare = Explained(subject, index(host, basis), means(subject, clean), [], {"L1.mlp": torch.arange(10)})
    found = understanding(score(bare, prompts_of(bare)))
    assert found.whole.value == pytest.approx(1, abs=1e-5) and abs(found.shares["error"].value) > 0.01 and found.shares["pruned"].value != 0
    unit = {hole.unit: hole for hole in holes(bare, prompts_of(bare))}
    assert unit["L0.mlp.error"].kl > 0 and unit["L1.mlp"].nodes == basis["L1.mlp"].count - 10


def test_holes_rank_what_is_not_explained(explained):
    found = holes(explained, prompts_of(explained))
    assert [hole.kl for hole in found] == sorted((hole.kl for hole in found), reverse=True) and found[0].kl > 0
    units = {hole.unit for hole in found}
    assert "L0.mlp" not in units and "L1.mlp" in units and "L0.H0 pattern" not in units and "L1.H0 pattern" in units
    assert found[0].examples and found[0].lengths[f"{BUCKETS[1]}+"] is None


def test_buckets_count_what_stands_before_the_predicted_token():
    values = torch.zeros(1, 300)
    values[0, 62], values[0, 63], values[0, 299] = 1, 2, 4
    assert bucketed(values).tolist() == [[1, 2, 0, 4]]


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory):
    """A copy of the tiny run that was measured."""
    patch = pytest.MonkeyPatch()
    patch.setattr("graphs.hypotheses.proposals.LOOKS", (("", ""),))
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("understood") / "run")
    assert main(["understand", str(folder), "--rows", "24", "--judged", "32", "--tested", "2", "--prompts", "8", "--holes"]) == 0
    patch.undo()
    return folder


def test_the_verb_writes_what_it_prints(measured, capsys):
    assert main(["understand", str(measured), "--rows", "24", "--judged", "32", "--tested", "2", "--prompts", "8", "--holes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == read_json(measured / "understanding.json") and set(found["all"]["shares"]) == set(GROUPS)
    assert sum(one["value"] for one in found["all"]["shares"].values()) == pytest.approx(found["all"]["whole"]["value"])
    assert set(found["tasks"]) == {"coding"} and found["holes"] and {one["kind"] for one in found["hypotheses"]} >= {"look"}
    rejected = [one for one in found["hypotheses"] if one["evidence"]["why"]]
    assert rejected and sum(found["nodes"].values()) > 0
    assert main(["understand", str(measured), "--rows", "24", "--judged", "32", "--tested", "2", "--prompts", "8"]) == 0
    page = capsys.readouterr().out
    assert "understood" in page and "shuffled hypotheses" in page and "pruned (0)" in page
    heads = page.splitlines()[2].split()
    assert heads.count("all") == 1 and "coding" not in heads and heads.count("0+") == 1  # one task is all
    both = lines_of(found | {"tasks": dict.fromkeys(("coding", "math"), found["all"])}).splitlines()[2].split()
    assert "coding" in both and "math" in both
    wide = lines_of(found | {"contexts": {f"context-{number}": found["all"] for number in range(6)}}).splitlines()
    assert max(len(line) for line in wide if "[" in line and "  e.g." not in line and " nats" not in line) <= 150
    assert sum("context-5" in line for line in wide) == 1 and sum(line.startswith("understood") for line in wide) > 1


def test_the_gate_passes_and_fails(measured, capsys):
    assert main(["gate", str(measured)]) == 1 and "FAIL  understood" in capsys.readouterr().out
    found = read_json(measured / "understanding.json")
    found["all"]["null"]["value"] = 0.0
    write_json(measured / "understanding.json", found)
    assert main(["gate", str(measured), "--min-understood", "-9", "--max-error", "9"]) == 0 and "FAIL" not in capsys.readouterr().out
    write_json(measured / "understanding.json", found | {"all": found["all"] | {"null": found["all"]["null"] | {"value": NULL + 0.01}}})
    assert main(["gate", str(measured), "--min-understood", "-9", "--max-error", "9", "--json"]) == 1
    assert [one["passed"] for one in json.loads(capsys.readouterr().out)] == [True, True, False]
    write_json(measured / "understanding.json", found | {"key": "of another circuit"})
    assert main(["gate", str(measured)]) == 2 and "has changed since it was measured" in capsys.readouterr().err


def test_the_gate_and_the_test_ask_for_what_is_missing(tiny_run, capsys):
    assert main(["gate", str(tiny_run)]) == 2 and "run distill understand" in capsys.readouterr().err
    assert main(["test", str(tiny_run), "--on", str(tiny_run / "checkpoint")]) == 2 and "no hypotheses yet" in capsys.readouterr().err


@pytest.fixture(scope="module")
def known(measured, tmp_path_factory):
    """The same run with hypotheses of the first MLP that are right on the very rows that the test draws: every triple of tokens listed."""
    folder = shutil.copytree(measured, tmp_path_factory.mktemp("known") / "run")
    opened = reopen(folder, "circuit")
    nodes = index(opened.subject.host, opened.subject.basis)
    seen = watch(opened.subject, nodes, rows_of_test(Verb(on=folder, run=folder, prompts=8), opened)["held out"], 0)
    patch, made = pytest.MonkeyPatch(), []
    patch.setattr("graphs.hypotheses.proposals.SEEN", 1)
    views = [fitted(seen.texts, name) for name in ("triple", "pair", "token")]
    for node in seen.own["L0.mlp"].var(0).topk(3).indices.tolist():
        rule = tables(views, seen.own["L0.mlp"][:, node : node + 1], 10**6)
        made.append(Judged(Hypothesis(f"L0.F{node}", rule), Evidence(1.0, 1e-3, Share(1.0, 1.0, 1.0), None)))
    patch.undo()
    write_json(folder / "hypotheses" / "circuit" / "hypotheses.json", [one.data() for one in made])
    return folder


def test_hypotheses_hold_in_the_compiled_checkpoint_and_break_in_a_changed_one(known, tmp_path, capsys):
    argv = ["test", str(known), "--prompts", "8"]
    assert main([*argv, "--on", str(known / "checkpoint"), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["rows"] for line in lines} == {"held out", "shifted"} and len(lines) == 6
    assert all(line["before"] > 0.5 for line in lines if line["rows"] == "held out")
    assert all(line["before"] == pytest.approx(line["after"], abs=2e-2) for line in lines)
    host = load(known / "checkpoint")
    with torch.no_grad():
        for site in host.sites:
            for weight in host.module(site.module).parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std())
    save(host, tmp_path / "changed", torch.float32)
    assert main([*argv, "--on", str(tmp_path / "changed")]) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said and "- recovers" in said and "+ recovers" in said


def test_a_checkpoint_of_another_shape_is_refused(known, tiny_model_folder, capsys):
    assert main(["test", str(known), "--on", str(tiny_model_folder)]) == 2
    assert "give " in capsys.readouterr().err
