"""Curves: faithfulness is 0 with no node and 1 with all, areas are those of the points, and the verb compares scores of a run."""

import json
import shutil

import pytest
import torch

from distill.__main__ import main
from distill.curve import COMPILED
from distill.runs import begun
from graphs.batches import Batch
from graphs.curve import SHARES, opened, trace_curve, trace_edge_curve
from graphs.edge_prune import counted
from graphs.edge_run import EdgeModel
from graphs.replace import Replacement, from_noise
from graphs.train import TrainConfig, train


def test_the_best_of_every_site_are_open():
    order = {"a": torch.tensor([0.3, 0.1, 0.9, 0.5]), "b": torch.arange(10.0)}
    gates = opened(order, 0.25)
    assert gates["a"].tolist() == [0, 0, 1, 0] and gates["b"].tolist() == [0] * 7 + [1] * 3
    assert not any(gate.any() for gate in opened(order, 0.0).values()) and all(gate.all() for gate in opened(order, 1.0).values())
    assert [int(gate.sum()) for gate in opened(order, 0.001).values()] == [1, 1]


def test_a_curve_goes_from_nothing_to_the_whole(tiny_host):
    made = from_noise(tiny_host, 16, 0)
    ids = torch.randint(3, 600, (4, 20), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        none = {name: torch.zeros(count) for name, count in made.node_counts().items()}
        for token in range(19):  # text that the whole finds likelier than nothing does
            with made.gated(none):
                nothing = made(ids)[:, token].log_softmax(-1)
            ids[:, token + 1] = (made(ids)[:, token].log_softmax(-1) - nothing).argmax(-1)
        target = made(ids)
    order = {name: torch.rand(count) for name, count in made.node_counts().items()}
    curve = trace_curve(made, order, [batch], [target])
    assert [point.share for point in curve.points] == list(SHARES)
    assert curve.points[0].faithfulness == 0 and curve.points[-1].faithfulness == 1
    assert curve.points[-1].kl == pytest.approx(0, abs=1e-6) and curve.points[0].kl > 0.01
    area = sum((b.share - a.share) * (a.faithfulness + b.faithfulness) / 2 for a, b in zip(curve.points, curve.points[1:], strict=False))
    assert curve.cpr == pytest.approx(area) and curve.points[-1].nodes == sum(made.node_counts().values())
    with pytest.raises(ValueError, match="no better than none of it"):
        trace_curve(made, order, [batch], [target], (1.0, 0.0))


@pytest.fixture
def learned(tiny_run, tmp_path):
    """A copy of the tiny run whose gated parts have learned some of the task's text: faithfulness has a meaning there."""
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    _, host, data = begun(folder)
    made = Replacement.load(folder / ".work" / "gated", host)

    def loss(step):
        batch = data(step)
        return torch.nn.functional.cross_entropy(made(batch.ids)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())

    train(made, loss, TrainConfig(40, 1e-2), "text")
    made.save(folder / ".work" / "gated")
    return folder


def test_the_verb_compares_scores(learned, capsys):
    argv = ["curve", "--run", str(learned), "--judged", "32", "--score", "gates,relp,random", "--score-batches", "2"]
    assert main([*argv, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made["curves"]) == {"gates", "relp", "random"} and made["parts"] == "as gated" and made["attention_nodes"] == "heads"
    for curve in made["curves"].values():
        assert curve["points"][0]["faithfulness"] == 0 and curve["points"][-1]["faithfulness"] == 1
        assert curve["points"][-1]["nodes"] == made["nodes"]
    assert len({curve["cpr"] for curve in made["curves"].values()}) == 3  # three orders, three curves
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[3:6]} == {"gates", "relp", "random"} and "CMD" in lines[2]
    assert main([*argv, "--answers", "4", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["compiled"]
    assert [point["share"] for point in points] == list(COMPILED) and all(point["right"]["coding"]["count"] == 4 for point in points)
    sizes = [point["params"] for point in points]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] and all(point["tokens_per_second"]["value"] > 0 for point in points)
    shutil.rmtree(learned / ".work" / "gated")
    assert main(argv) == 2 and "name other scores" in capsys.readouterr().err


@torch.no_grad()
def test_a_curve_of_edges_goes_from_nothing_to_the_whole(tiny_host):
    whole = from_noise(tiny_host, 16, 0).eval()
    run, ids = EdgeModel(whole), torch.randint(3, 600, (2, 8), generator=torch.Generator().manual_seed(0))
    for token in range(7):  # text that the whole finds likely
        ids[:, token + 1] = whole(ids)[:, token].argmax(-1)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))
    edges = counted(run, ids.unique())
    scores = {name: torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) for name, mask in edges.items()}
    curve = trace_edge_curve(run, scores, edges, [batch], [whole(ids)], (0.0, 0.5, 1.0))
    total = sum(int(mask.sum()) for mask in edges.values())
    assert [point.nodes for point in curve.points] == [0, round(total / 2), total]
    assert curve.points[0].faithfulness == 0 and curve.points[2].kl == pytest.approx(0, abs=1e-6)
    assert 1e-4 < curve.points[1].kl < curve.points[0].kl
    assert torch.allclose(run(ids), whole(ids), atol=1e-5)  # every edge is kept again


def test_the_verb_refuses_what_it_cannot_compare(tiny_run, capsys):
    assert main(["curve", "--run", str(tiny_run), "--judged", "32", "--score", "random"]) == 2 and "fit it for longer" in capsys.readouterr().err
    assert main(["curve", "--run", str(tiny_run), "--score", "magic"]) == 2 and "no such score" in capsys.readouterr().err
    assert main(["curve", "--run", str(tiny_run / "nothing")]) == 2 and "no such folder" in capsys.readouterr().err
