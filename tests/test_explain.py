"""distill explain on a finished tiny run: equations that sum, contexts that fire, one-sentence refusals."""

import json

import pytest
import torch

from distill.__main__ import main
from distill.runs import reopen
from graphs.edges import activations
from graphs.equations import equation


@pytest.fixture(scope="module")
def folder(tiny_run):
    return tiny_run


def explain(capsys, folder, *argv):
    status = main(["explain", *argv, "--run", str(folder), "--rows", "16"])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_a_node_is_explained_with_its_remainder_and_real_contexts(folder, capsys):
    opened = reopen(folder, "circuit")
    graph = opened.edges(16, 0.95, 1 << 28)
    node = max(range(*_range(graph, "L1.mlp")), key=lambda n: float(graph.active[n]))
    name = graph.index.name(node)
    status, out, _ = explain(capsys, folder, name, "--json", "--parents", "3")
    found = json.loads(out)
    assert status == 0 and found["equation"]["node"] == name and len(found["equation"]["terms"]) == 3
    total = sum(term["flow"] for term in found["equation"]["terms"]) + found["equation"]["rest"] + found["equation"]["constant"]
    drives, best = [], 0.0
    for batch in opened.sample(16):
        seen = opened.subject.trace(batch.ids).sites["L1.mlp"]
        place = node - graph.index.by_name["L1.mlp"].start
        a = activations(opened.subject.basis["L1.mlp"], seen)[batch.real][:, place]
        drives.append(opened.subject.basis["L1.mlp"].drive(seen.x)[batch.real][:, place][a > 0])
        best = max(best, float(a.max()))
    assert total == pytest.approx(float(torch.cat(drives).mean()), abs=1e-3)
    assert found["contexts"][0]["activation"] == pytest.approx(best, abs=1e-4)
    status, out, _ = explain(capsys, folder, name)
    assert status == 0 and out.startswith(f"{name}  (circuit of") and f"{name} = relu(" in out and ">>" in out and "carry any" in out


def _range(graph, name):
    block = graph.index.by_name[name]
    return block.start, block.start + block.count


def test_edges_are_built_once(folder):
    opened = reopen(folder, "circuit")
    opened.edges(16, 0.95, 1 << 28)
    before = (folder / "edges" / "circuit" / "edges.safetensors").stat().st_mtime_ns
    opened.edges(16, 0.95, 1 << 28)
    assert (folder / "edges" / "circuit" / "edges.safetensors").stat().st_mtime_ns == before


def test_the_fitted_graph_can_be_explained_too(folder):
    opened = reopen(folder, "graph")
    graph = opened.edges(16, 0.95, 1 << 28)
    assert graph.index.by_name["L1.mlp"].count == 32
    assert equation(graph, graph.index.find("L1.F0")).node == "L1.F0"


def test_a_head_is_explained_by_the_pairs_that_steer_it(folder, capsys):
    status, out, _ = explain(capsys, folder, "L1.H0", "--json", "--parents", "4")
    found = json.loads(out)
    assert status == 0 and found["head"] == "L1.H0" and len(found["pairs"]) == len(found["asking"]) == 4
    assert 0 < found["first"] < 1 and found["tokens"] == reopen(folder, "circuit").edges(16, 0.95, 1 << 28).tokens
    status, out, _ = explain(capsys, folder, "L1.H0")
    assert status == 0 and out.startswith("L1.H0  (circuit of") and "asks -> answers" in out


@pytest.mark.parametrize(("argv", "sentence"), [
    (["L1.H9"], "layer 1 has H0 to H"), (["L7.H0"], "layers are L0 to L1"),
    (["L9.F0"], "no such node"), (["L1.F9999"], "layer 1 has F0 to"), (["token 'nonsenseword'"], "is not one token"),
    ([], "explain needs a node"), (["L0.mlp.bias"], "reads nothing"),
    (["L0.F0", "--parents", "0"], "at least 1"),
])
def test_wrong_nodes_get_one_sentence(folder, capsys, argv, sentence):
    status, _, err = explain(capsys, folder, *argv)
    message = err.strip().splitlines()[-1]
    assert status == 2 and message.startswith("distill: ") and sentence in message


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert explain(capsys, tmp_path / "nothing", "L0.F0")[2].strip().endswith("no such folder; give the --out of a distill prune")
    assert "holds no circuit/" in explain(capsys, tmp_path, "L0.F0")[2]
