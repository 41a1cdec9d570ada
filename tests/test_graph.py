"""distill graph: its numbers are those of the pieces they come from, for the fitted graph and the circuit; wrong input gets one sentence."""

import json

import pytest
import torch

from distill.__main__ import main
from distill.graph import parents
from distill.runs import reopen
from graphs.host import load


def measured(capsys, folder, *argv):
    status = main(["graph", "--run", str(folder), "--rows", "16", "--judged", "32", "--prompts", "3", *argv])
    return status, capsys.readouterr()


def test_a_circuit_has_no_errors_and_the_fitted_graph_does(tiny_run, capsys):
    graph, circuit = (json.loads(measured(capsys, tiny_run, "--json", "--part", part)[1].out) for part in ("graph", "circuit"))
    for key in ("replacement", "completeness"):
        assert circuit["tasks"]["coding"][key]["value"] == pytest.approx(1, abs=1e-4)
        assert 0 < graph["tasks"]["coding"][key]["value"] < 1 and graph["tasks"]["coding"][key]["count"] == 3
    assert graph["tasks"]["coding"]["kl"] > 0 and all(value > 0 for value in graph["tasks"]["coding"]["fvu"].values())
    assert graph["by_position"]["BOS"] >= 0 and graph["longest"] > 30


def test_kl_is_against_the_model_the_run_began_with(tiny_run, tiny_model_folder, capsys):
    opened = reopen(tiny_run, "circuit")
    ids = opened.sample(16)[0].ids
    assert torch.equal(opened.model.model(input_ids=ids).logits, load(tiny_model_folder).model(input_ids=ids).logits)
    assert not torch.equal(opened.model.model(input_ids=ids).logits, opened.subject.host.model(input_ids=ids).logits)


def test_parents_are_counted_from_the_largest_share(tiny_run):
    graph = reopen(tiny_run, "graph").edges(16, 0.95, 1 << 28)
    found = parents(graph)
    assert list(found["feature"].values()) == sorted(found["feature"].values()) and found["feature"]["0.95"] > 1
    counts = []
    for name in ("L0.mlp", "L1.mlp"):
        block = graph.index.by_name[name]
        for node in range(block.start, block.start + block.count):
            shares = sorted(graph.share[graph.into(node)].tolist(), reverse=True)
            counts += [next(i for i in range(1, len(shares) + 1) if sum(shares[:i]) >= 0.5 - 1e-6)] if shares else []
    assert found["feature"]["0.5"] == float(torch.tensor(counts, dtype=torch.float64).median())


def test_it_prints_and_refuses(tiny_run, tmp_path, capsys):
    status, said = measured(capsys, tiny_run)
    assert status == 0 and "completeness" in said.out and "parents of the median feature" in said.out
    assert main(["graph", "--run", str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().err
    assert main(["graph", "--model", "builtin:base"]) == 2 and "give --run" in capsys.readouterr().err
