"""The viewer: a page for a circuit and for a prompt, whole and harmless; a real browser walks it with real clicks."""

import json

import pytest
import torch

from distill import config
from distill.__main__ import main
from distill.view import page
from graphs.contexts import Context, top_contexts
from graphs.dictionary import Dictionary, Part
from graphs.edges import Reconstruction
from graphs.flow import build
from graphs.graph import FeatureGraph
from graphs.host import save
from graphs.picture import Dot, Picture, of_graph, of_prompt
from graphs.prompt_graph import attribute
from graphs.tracer_format import export, validate
from graphs.zoo import save_sae_lens
from tests.chromium import Browser
from tests.test_edges import prompt, random_basis, tiny
from tests.test_flow import batches


@pytest.fixture(scope="module")
def subject():
    host = tiny("GPT2LMHeadModel")
    return Reconstruction(host, random_basis(host))


@pytest.fixture(scope="module")
def graph(subject) -> FeatureGraph:
    return build(subject, batches())


def test_a_picture_of_a_graph_is_cut_to_what_was_asked_and_says_so(subject, graph):
    picture = of_graph(graph, top_contexts(subject, graph, graph.index.inner, batches(), 3), nodes=60, edges=120)
    assert len(picture.dots) == 60 and 0 < len(picture.lines) <= 120 + 60 and "60 of " in picture.about
    names = [dot.name for dot in picture.dots]
    for source, target, coefficient, share in picture.lines:
        assert picture.dots[source].row < picture.dots[target].row and coefficient == coefficient and 0 < share <= 1
    first = next(dot for dot in picture.dots if dot.kind == "feature")
    node = graph.index.find(first.name)
    wanted = top_contexts(subject, graph, [node], batches(), 3)[node]
    assert [c.activation for c in first.contexts] == pytest.approx([c.activation for c in wanted]) and len(set(names)) == len(names)


def test_an_edge_from_an_error_is_drawn_without_a_number_that_json_cannot_hold(graph):
    data = page(of_graph(graph, {}), "t")
    assert "NaN" not in data.split('id="data">')[1].split("</script>")[0]


def test_what_a_model_wrote_never_becomes_markup():
    evil = "</script><img src=x onerror=alert(1)>\u202e"
    dot = Dot(evil, "feature", 0, 0, 1.0, evil, evil, (Context(1.0, evil, evil, evil),))
    text = page(Picture((dot,), (), ("x",), evil), evil)
    assert "<img" not in text and "\u202e" not in text and text.count("</script>") == 2


def test_a_prompt_graph_exports_to_circuit_tracers_layout(subject):
    ids = prompt()[0].tolist()
    made = export(attribute(subject, prompt()), ids, "x", "slug", "scan", 2, 23, 0.8)
    validate(made)
    kinds = {node["feature_type"] for node in made["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "attention reconstruction error", "embedding", "logit"} and made["links"]
    assert sum(node["is_target_logit"] for node in made["nodes"]) == 1
    del made["nodes"][0]["ctx_idx"]
    with pytest.raises(ValueError, match=r"nodes: fields \['ctx_idx'\] are missing or unknown"):
        validate(made)


def test_the_verb_writes_both_pages(tiny_run, tmp_path, capsys):
    assert main(["view", "--run", str(tiny_run), "--rows", "16", "--out", str(tmp_path / "view.html")]) == 0
    assert str(tmp_path / "view.html") in capsys.readouterr().out
    argv = ["view", "--run", str(tiny_run), "--prompt", "def solve(prices):\\n", "--tracer", str(tmp_path / "t.json"), "--json", "--part", "graph"]
    assert main(argv) == 0
    made = json.loads((tmp_path / "t.json").read_text())
    validate(made)
    assert made["metadata"]["prompt"] == "def solve(prices):\n" and json.loads(capsys.readouterr().out)["page"] == str(tiny_run / "prompt.html")
    assert main(["view", "--run", str(tiny_run), "--tracer", str(tmp_path / "t.json")]) == 2
    assert "give --prompt too" in capsys.readouterr().err
    assert config.View().nodes == 3000


def test_a_bare_model_is_drawn_by_its_own_neurons_or_by_dictionaries_of_some_layers(tmp_path, capsys):
    host = tiny("LlamaForCausalLM")  # its tokenizer has no BOS
    save(host, tmp_path / "model", torch.float32)
    out, argv = tmp_path / "page.html", ["view", "--model", str(tmp_path / "model"), "--prompt", "w3 w4 w5"]
    assert main([*argv, "--out", str(out)]) == 0 and "replacement score 1.000" in capsys.readouterr().out
    part = Part(torch.randn(20, 32), torch.zeros(20), torch.randn(20, 32))
    save_sae_lens(Dictionary((part,), torch.zeros(32)), tmp_path / "dictionaries" / "layer_1", host.sites[3], "mlp.hook_in")
    assert main([*argv, "--out", str(out), "--dictionaries", str(tmp_path / "dictionaries")]) == 0
    assert "L0.mlp.error" in out.read_text()  # a layer without a dictionary is all error
    capsys.readouterr()

    def refused(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "needs --out FILE" in refused(*argv)
    assert "a global graph needs the clean rows of a run" in refused("explain", "L0.F1", "--model", tmp_path / "model")
    assert not (tmp_path / "model" / ".lock").exists() and not list((tmp_path / "model").glob("edges"))
    assert "belong to --model" in refused("view", "--prompt", "w3", "--dictionaries", tmp_path)
    assert "give a share above 0" in refused("view", "--influence", "0")
    save(tiny("Gemma2ForCausalLM"), tmp_path / "gemma", torch.float32)
    assert "have no fixed write vectors" in refused("view", "--model", tmp_path / "gemma", "--prompt", "w3", "--out", out)


def picture_of(count: int, links: int) -> Picture:
    """A made-up circuit of that size."""
    generator = torch.Generator().manual_seed(0)
    dots = [Dot(f"L{i * 8 // count}.F{i}", "feature", i * 8 // count, 0, 0.5, "a feature", f"L{i * 8 // count}.F{i} = relu(0)") for i in range(count)]
    pairs = torch.randint(0, count, (links, 2), generator=generator).sort(1).values.tolist()
    lines = [(a, b, 1.0, 0.05) for a, b in pairs if dots[a].row < dots[b].row]
    return Picture(tuple(dots), tuple(lines), tuple(f"L{i}" for i in range(8)), "made up")


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_draws_thousands_of_nodes_and_walks_them_by_click(tmp_path):
    (tmp_path / "view.html").write_text(page(picture_of(3000, 35_000), "big"))
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "view.html", "ready")
        data = "document.documentElement.dataset"
        assert browser.evaluate(f"{data}.error") is None and int(browser.evaluate(f"{data}.edges")) > 28_000
        empty = browser.screenshot()
        browser.click(*browser.evaluate("graphView.at('L3.F1300')"))
        chosen = browser.evaluate(f"{data}.chosen")
        assert chosen.startswith("L3.F") and browser.screenshot() != empty
        assert "Parents (" in browser.evaluate("detail.innerText") and f"{chosen} = relu" in browser.evaluate("detail.innerText")
        where = "detail.querySelector('ul button').getBoundingClientRect()"
        browser.click(browser.evaluate(f"{where}.x + 30"), browser.evaluate(f"{where}.y + {where}.height / 2"))  # to its first parent
        parent = browser.evaluate(f"{data}.chosen")
        assert parent != chosen and int(parent[1]) < 3
        before = int(browser.evaluate(f"{data}.edges"))
        browser.evaluate("(() => { const s = document.getElementById('least'); s.value = .5; s.dispatchEvent(new Event('input')); })()")
        browser.evaluate("new Promise(requestAnimationFrame)")
        browser.open(tmp_path / "view.html", "ready")
        browser.evaluate("document.getElementById('search').focus()")
        browser.type("l5.f2000")
        browser.press("Enter")
        assert browser.evaluate(f"{data}.chosen") == "L5.F2000" and before > 28_000


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_draws_a_prompt(subject, tmp_path):
    (tmp_path / "prompt.html").write_text(page(of_prompt(attribute(subject, prompt())), "a prompt"))
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "prompt.html", "ready")
        name = browser.evaluate("graphView.nodes.filter((n) => n.kind === 'feature')[0].name")
        browser.click(*browser.evaluate(f"graphView.at({name!r})"))
        data = "document.documentElement.dataset"
        assert browser.evaluate(f"{data}.chosen") and browser.evaluate(f"{data}.error") is None
