"""Scores of edges: each is what it says on single edges; cuts are counted; healing and gates lead to fewer edges and a smaller KL."""

import json
import shutil

import pytest
import torch

from distill.__main__ import main
from distill.edges import exactness, page
from distill.runs import reopen
from graphs.batches import Batch, Encoded, Epochs
from graphs.edge_prune import GATES, SCORES, ThinConfig, best, counted, learn_gates, set_means, stages, thin
from graphs.edge_run import EdgeModel
from graphs.losses import divergence
from graphs.targets import Targets
from tests.test_edge_run import circuit

SEEN = torch.arange(3, 23)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    ids, real = torch.randint(3, 23, (4, 8), generator=generator), torch.ones(4, 8, dtype=torch.bool)
    real[1, 6:] = False
    return Batch(ids.masked_fill(~real, 2), real, real & (torch.arange(8) > 2))


def loss_of(run, batch):
    labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
    logits = run(batch.ids)[:, :-1]
    return torch.stack([torch.nn.functional.cross_entropy(a, b, reduction="sum") for a, b in zip(logits, labels, strict=True)])


def test_fisher_is_the_square_of_what_a_row_loses_as_an_edge_closes(batch):
    run = EdgeModel(circuit())
    set_means(run, [batch])
    scores = SCORES["fisher"](run, [batch], 0)
    for name, reader in run.readers.items():
        reader.gate = gate = torch.ones(reader.kept.shape, requires_grad=True)
        slopes = torch.stack([torch.autograd.grad(loss, gate, retain_graph=True)[0] for loss in loss_of(run, batch)])
        reader.gate = None
        assert torch.allclose(scores[name], slopes.square().sum(0), atol=1e-5) and scores[name].max() > 1e-3


@torch.no_grad()
def test_flow_is_the_share_of_a_targets_mean_absolute_contributions(batch):
    run = EdgeModel(circuit())
    flow, size = SCORES["flow"](run, [batch], 0)["L0.mlp"], SCORES["magnitude"](run, [batch], 0)["L0.mlp"]
    run(batch.ids)
    scale, token = run.stream.inverse[run.readers["L0.mlp"].path], batch.ids[0, 4]
    virtual = run.readers["L0.mlp"].virtual()[0]
    token_sum = virtual[2, token].abs() * scale[batch.real & (batch.ids == token)].sum()
    bias = run.columns()["L0.attention"].stop - 1
    bias_sum = virtual[2, bias].abs() * scale[batch.real].sum()
    assert flow[2, token] / flow[2, bias] == pytest.approx(float(token_sum / bias_sum), rel=1e-4) or bias_sum == 0
    assert torch.allclose(flow.sum(1), torch.ones(len(flow)), atol=1e-5) and torch.allclose(size.sum(1), flow.sum(1), atol=1e-5)
    assert flow[:, 40].abs().max() == 0 < size[:, 40].min()  # a token that no row holds carries nothing


def test_cuts_are_counted_and_leave_what_is_not_an_edge(batch):
    run = EdgeModel(circuit())
    edges = counted(run, SEEN)
    assert not edges["L0.mlp"][:, 40].any() and edges["L0.mlp"][:, 5].all() and not edges["logits"][40].any()
    total, scores = sum(int(mask.sum()) for mask in edges.values()), SCORES["random"](run, [batch], 0)
    for share in (0.0, 0.1, 0.37, 1.0):
        kept = best(scores, edges, share)
        assert sum(int((kept[name] & mask).sum()) for name, mask in edges.items()) == round(share * total)
        assert all((kept[name] | mask).all() for name, mask in edges.items())
    worst = min(float(scores[name][best(scores, edges, 0.1)[name] & mask].min()) for name, mask in edges.items())
    assert sum(int((scores[name][mask] > worst).sum()) for name, mask in edges.items()) < round(0.1 * total)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        best(scores, edges, 1.5)


def test_means_are_of_clean_tokens(batch):
    run = EdgeModel(circuit())
    set_means(run, [batch, batch])
    with torch.no_grad():
        run(batch.ids)
        reader = run.readers["L1.mlp"]
        scaled = run.stream.active[0] * run.stream.inverse[reader.path][..., None]
    assert torch.allclose(reader.mean[run.columns()["L0.attention"]], scaled[batch.real].mean(0), atol=1e-5)


def targets_for(whole):
    generator = torch.Generator().manual_seed(6)
    rows = [Encoded(tuple(torch.randint(3, 23, (10,), generator=generator).tolist()), 2) for _ in range(16)]
    return Targets(whole.host(), Epochs(rows, 8, 2, 0))


def distance(run, targets):
    batch = targets.batches(0)
    with torch.no_grad():
        return float(divergence(run(batch.ids), targets(batch), batch, 1.0))


def test_the_best_edges_beat_random_ones_and_healing_beats_none():
    whole = circuit()
    targets, found = targets_for(whole), {}
    for score, steps in (("random", 0), ("flow", 0), ("fisher", 0), ("fisher", 30), (GATES, 30)):
        run = EdgeModel(whole)
        edges = counted(run, SEEN)
        losses = thin(run, targets, edges, ThinConfig(0.3, score, steps))
        kept = sum(int((run.readers[name].kept & mask).sum()) for name, mask in edges.items())
        assert kept == round(0.3 * sum(int(mask.sum()) for mask in edges.values())) and len(losses) == steps
        found[score, steps] = distance(run, targets)
    assert found["fisher", 0] < found["random", 0] and found["flow", 0] < found["random", 0]
    assert found["fisher", 30] < 0.5 * found["fisher", 0] and found[GATES, 30] < found["fisher", 0]


def test_gates_are_drawn_towards_the_share():
    whole = circuit()
    targets, found = targets_for(whole), {}
    for share in (0.1, 0.9):
        run = EdgeModel(whole)
        edges = counted(run, SEEN)
        scores, losses = learn_gates(run, targets, edges, SCORES["random"](run, [], 0), share, 30, 0, 0)
        assert len(losses) == 30 and all(reader.gate is None for reader in run.readers.values())
        assert all(not scores[name][~mask].any() for name, mask in edges.items())
        found[share] = float(torch.cat([scores[name][mask] for name, mask in edges.items()]).mean())
    assert found[0.1] < found[0.9] - 1  # the same start and the same draws: the share alone differs


def test_stages_fall_to_the_share_and_share_the_steps():
    plan = stages(ThinConfig(0.1, "fisher", 60))
    assert plan[0] == (0.5, 10) and plan[-1] == (0.1, 20) and sum(steps for _, steps in plan) == 60
    assert [share for share, _ in plan] == sorted((share for share, _ in plan), reverse=True)
    assert stages(ThinConfig(0.2, "flow")) == [(0.2, 0)] and stages(ThinConfig(0.2, GATES, 40)) == [(0.2, 20)]


def test_the_verb_judges_a_circuit_as_it_runs(tiny_run, tmp_path, capsys):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    argv = ["evaluate", "--run", str(folder), "--prompts", "2", "--as"]
    assert main([*argv, "edges", "--edges", "1", "--edge-score", "random", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = [found["models"][name]["tasks"]["coding"]["nll"]["value"] for name in ("edges", "checkpoint")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and found["edges"]["all"][0] == found["edges"]["all"][1]
    assert sum(kept for key, (kept, _) in found["edges"].items() if key != "all") == found["edges"]["all"][0] and found["slower"]["value"] > 0
    out = page(found)
    assert "times as long as from the checkpoint" in out and "token to feature" in out
    assert main([*argv, "graph", "--json"]) == 0
    graph = json.loads(capsys.readouterr().out)
    assert graph["models"]["graph"]["tasks"]["coding"]["nll"]["value"] == pytest.approx(losses[1], abs=1e-5) and graph["edges"] is None
    assert main([*argv, "edges", "--edge-score", "gates"]) == 2 and "--edge-steps" in capsys.readouterr().err
    assert main(["evaluate", "--model", "builtin:base", "--as", "graph"]) == 2 and "--as judges the circuit of a run" in capsys.readouterr().err


def test_exactness_is_measured_against_the_checkpoint(tiny_run):
    found = exactness(reopen(tiny_run, "circuit"))
    assert found["float64"] < 1e-5 and found["float32"] < 1e-5 < found["largest_logit"]


def test_curve_refuses_what_edges_have_not(tiny_run, capsys):
    argv = ["curve", "--run", str(tiny_run), "--edges", "--judged", "32", "--score-batches", "1"]
    assert main([*argv, "--score", "relp"]) == 2 and "no such score of edges" in capsys.readouterr().err
    assert main([*argv, "--answers", "4"]) == 2 and "no place for cut edges" in capsys.readouterr().err
