"""Hypotheses: the right one is accepted and the wrong one rejected, by what they do in the place of a node or a head known by construction."""

import json

import numpy as np
import pytest
import torch

from graphs.batches import Batch
from graphs.edges import Reconstruction
from graphs.graph import index
from graphs.hypotheses.hypothesis import Head, Hypothesis, Look, Sum, Table, Tables, read
from graphs.hypotheses.proposals import MOST, equation, fitted, for_nodes, looks, tables
from graphs.hypotheses.study import watch
from graphs.hypotheses.substitution import Change, Looking, coded, dealt, means, run
from graphs.hypotheses.verdict import Bench, Judged, judge
from graphs.hypotheses.views import RELATIONS, VIEWS, Text
from graphs.intervene import Held
from tests.test_edges import neuron_basis, tiny

PLACES, CODES = 16, 8


def with_previous_token_head():
    """A GPT-2 whose L0.H0 looks at the token before, by its position embeddings, and whose other L0 heads write nothing."""
    host = tiny("GPT2LMHeadModel")
    block, generator = host.model.transformer.h[0], torch.Generator().manual_seed(1)
    code = torch.nn.functional.normalize(torch.randn(PLACES + 1, CODES, generator=generator), dim=1)
    with torch.no_grad():
        host.model.transformer.wte.weight[:, 16:] = 0
        host.model.transformer.wpe.weight.zero_()
        places = host.model.transformer.wpe.weight[:PLACES, 16:]
        places.copy_(3 * torch.eye(PLACES))
        block.ln_1.weight.fill_(1)
        block.ln_1.bias.zero_()
        block.attn.c_attn.weight[:, :CODES] = 0
        block.attn.c_attn.weight[:, 32 : 32 + CODES] = 0
        block.attn.c_attn.weight[16:, :CODES] = 4 * code[:PLACES]
        block.attn.c_attn.weight[16:, 32 : 32 + CODES] = 4 * code[1:]
        block.attn.c_attn.bias[:CODES] = 0
        block.attn.c_attn.bias[32 : 32 + CODES] = 0
        block.attn.c_proj.weight[CODES:] = 0
        block.attn.c_attn.weight[16:, 64 : 64 + CODES] = 0  # what it copies is the token's
    return host


def rows(seed, count=16):
    ids = torch.randint(3, 50, (count, PLACES), generator=torch.Generator().manual_seed(seed))
    real = torch.ones_like(ids, dtype=torch.bool)
    completion = real.clone()
    completion[:, 0] = False
    return Batch(ids, real, completion)


@pytest.fixture(scope="module")
def bench():
    host = with_previous_token_head()
    subject = Reconstruction(host, neuron_basis(host))
    clean = [rows(seed) for seed in range(2, 14)]
    return Bench.of(subject, index(host, subject.basis), means(subject, clean), [rows(1, 24)]), clean


def test_a_known_head_is_explained_by_the_right_relation_and_not_by_a_wrong_one(bench):
    bench, _ = bench
    right = judge(bench, Hypothesis("L0.H0", Look({"previous": 30.0})))
    assert right.evidence.accepted and right.evidence.recovered.value > 0.95 and right.evidence.fit > 0.95
    assert right.evidence.null is not None and right.evidence.null.value <= 0.2
    for wrong in (Look({"itself": 30.0}), Look({"first": 30.0}), Look({"after same token": 30.0})):
        rejected = judge(bench, Hypothesis("L0.H0", wrong)).evidence
        assert not rejected.accepted and "less than 0.8" in rejected.why
    silent = judge(bench, Hypothesis("L0.H1", Look({"previous": 30.0}))).evidence
    assert not silent.accepted and "too little to explain" in silent.why


def test_a_shuffled_hypothesis_is_rejected_even_where_its_target_matters(bench):
    bench, _ = bench
    text = bench.texts[0]
    site, look = coded(bench.nodes, text, Hypothesis("L0.H0", Look({"previous": 30.0})))
    generator = torch.Generator().manual_seed(0)
    wrong = dealt(look, text, generator)
    assert isinstance(wrong, Looking) and torch.allclose(wrong.pattern.sum(-1), torch.ones(1)) and not (wrong.pattern * ~text.seen[:, None]).any()
    zero = bench.effect(bench.ablation("L0.H0", True)).sum()
    assert 1 - bench.effect([Change(looks={site: [wrong]})]).sum() / zero <= 0.02
    held = dealt(Held(torch.tensor([0]), torch.arange(24.0 * 16).view(24, 16, 1)), text, generator)
    assert held.values.flatten().sort().values.tolist() == list(range(24 * 16)) and held.values[0, 1] != 1


def test_proposals_find_the_head_and_the_nodes_behind_it(bench, monkeypatch):
    monkeypatch.setattr("graphs.hypotheses.proposals.LOOKS", (("", ""), ("", "token")))
    bench, clean = bench
    seen = watch(bench.subject, bench.nodes, clean, 6)
    divergence, look = looks(seen.texts[:6], seen.patterns["L0.attention"], 60)[0][0]
    assert divergence < 0.1 and (look.relations["previous"] + look.distance[1] > 3 + look.distance[0] + look.relations["itself"])
    assert judge(bench, Hypothesis("L0.H0", look)).evidence.accepted
    order = seen.own["L0.mlp"].var(0).argsort(descending=True)[:6].tolist()
    made = for_nodes(seen.texts, seen.own["L0.mlp"], order)
    assert made and all(entry.numbers <= MOST + 2 for entry in made.values())


def test_a_node_that_detects_tokens_by_construction_is_accepted_as_that_and_not_as_another():
    host = with_previous_token_head()
    with torch.no_grad():  # nothing but the token reaches the first MLP
        host.model.transformer.h[0].attn.c_proj.weight.zero_()
        host.model.transformer.wpe.weight.zero_()
    subject = Reconstruction(host, neuron_basis(host))
    clean = [rows(seed, 32) for seed in range(2, 14)]
    seen = watch(subject, index(host, subject.basis), clean, 0)
    bench = Bench.of(subject, index(host, subject.basis), means(subject, clean), [rows(1, 24)])
    node = int((seen.own["L0.mlp"].var(0) * subject.basis["L0.mlp"].writes.norm(dim=1)).argmax())
    rule = tables([fitted(seen.texts, "token")], seen.own["L0.mlp"][:, node : node + 1])
    right = judge(bench, Hypothesis(f"L0.F{node}", rule))
    assert right.evidence.accepted and right.evidence.fit > 0.95
    names = list(rule.tables[0].values)
    moved = Table("token", dict(zip(names, (rule.tables[0].values[name] for name in names[1:] + names[:1]), strict=True)))
    for wrong in (Tables((moved,), rule.otherwise), Tables((Table("previous token", rule.tables[0].values),), rule.otherwise)):
        assert not judge(bench, Hypothesis(f"L0.F{node}", wrong)).evidence.accepted


def test_an_equation_is_found_and_runs_over_the_parents_values_of_the_run():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, generator=generator).relu()
    said = equation(torch.stack([a, b], 1), ["L0.F3", "L0.F4"], torch.relu(3 * a + 4 * b - 1))
    assert said.terms["L0.F3"] == pytest.approx(3, abs=0.01) and said.terms["L0.F4"] == pytest.approx(4, abs=0.01)
    assert said.constant == pytest.approx(-1, abs=0.01)
    host = tiny("GPT2LMHeadModel")
    subject = Reconstruction(host, neuron_basis(host))
    nodes, ids = index(host, subject.basis), rows(0).ids
    one = Hypothesis("L1.F5", Sum({"L0.F3": 3.0, "L0.H1.C2": 4.0, "token 'w7'": 2.0}, -1.0))
    bench = Bench.of(subject, nodes, means(subject, [rows(0)]), [rows(0)])
    from graphs.hypotheses.substitution import compiled

    values: dict = {}
    run(subject, ids, Change(values={"L0.mlp": [Held(torch.tensor([3]), torch.tensor([2.0]))]}, equations=compiled(nodes, subject, [one])), values)
    wanted = torch.relu(3 * 2.0 + 4 * values["L0.attention"][..., 1 * 8 + 2] + 2.0 * (ids == 7) - 1)
    assert torch.allclose(values["L1.mlp"][..., 5], wanted, atol=1e-5)
    assert not judge(bench, one).evidence.accepted  # made up


@torch.no_grad()
def test_a_run_without_a_change_is_the_model_and_a_whole_head_held_at_its_own_values_too(bench):
    bench, _ = bench
    ids = bench.texts[0].batch.ids
    assert torch.allclose(run(bench.subject, ids, Change()), bench.subject.host.model(input_ids=ids).logits, atol=1e-5)
    own = bench.traces[0].sites["L0.attention"]
    part = bench.subject.basis["L0.attention"]
    whole = part.activations(own.x, own.pattern)[..., :8]
    change = Change(looks={"L0.attention": [Looking(torch.tensor([0, 2]), own.pattern[:, [0, 2]])]},
                    values={"L0.attention": [Held(torch.arange(8), whole)]})
    assert torch.allclose(run(bench.subject, ids, change), bench.targets[0], atol=1e-4)


def test_gemma_is_refused():
    host = tiny("Gemma2ForCausalLM")
    with pytest.raises(ValueError, match="hypotheses are not tested in Gemma2ForCausalLM"):
        run(Reconstruction(host, neuron_basis(host)), rows(0).ids, Change())


def test_hypotheses_are_data(bench):
    bench, _ = bench
    table = Tables((Table("pair", {"a|b": (0.5,)}),), (0.1,))
    look = Look({"previous": 3.0}, (0.1,), "state", "token", {"x\ty": 1.0})
    for rule in (table, Sum({"L0.F1": 2.0}, -1.0), look, Head(Look({"first": 1.0}), table)):
        one = Hypothesis("L1.H2", rule)
        again = read(json.loads(json.dumps(one.data())))
        assert again.line() == one.line() and json.dumps(again.data()) == json.dumps(one.data())
    tested = judge(bench, Hypothesis("L0.H0", Look({"previous": 30.0})))
    assert Judged.read(json.loads(json.dumps(tested.data()))).evidence == tested.evidence
    with pytest.raises(ValueError, match="no view or relation is called 'magic'"):
        read({"target": "L0.H0", "kind": "look", "rule": {"relations": {"magic": 1.0}, "distance": []}})
    with pytest.raises(ValueError, match="not a hypothesis"):
        read({"target": "L0.H0", "kind": "code", "rule": {}})


CODE = ["def", " f", "(", "n", "):", "\n   ", ' """', "Add", " 5", ',', " twice", '."""',
        "\n   ", " b", " =", " len", "(", "n", ")", "\n   ", " return", " b"]


def test_the_automaton_knows_where_in_a_program_it_is():
    states = dict(zip(range(len(CODE)), VIEWS["state"](CODE), strict=True))
    assert states[3] == "def, indent 0, brackets 1" and states[4] == "def, indent 0, brackets 0"
    assert states[5] == "line start, indent 0" and states[8] == "docstring" and states[12] == "line start, indent 0"
    assert states[13] == "other, indent 1, brackets 0" and states[15] == "right of =, indent 1, brackets 0" and states[17].endswith("brackets 1")
    assert states[21].startswith("return")
    assert VIEWS["line"](CODE)[17] == "0|    n = len(n" and VIEWS["line"](CODE)[10] == "1| twice"
    assert VIEWS["what followed"](["a", "b", "a", "b"]) == ["", "", "b", "a"] and VIEWS["previous token"](["a", "b"]) == ["", "a"]


@pytest.mark.parametrize("name", VIEWS)
def test_views_never_look_ahead(name):
    for cut in (1, 7, 13):
        assert VIEWS[name](CODE)[:cut] == VIEWS[name](CODE[:cut])


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_never_look_ahead(name):
    whole = RELATIONS[name](CODE)
    for cut in (1, 7, 13):
        seen = np.tri(cut, dtype=bool)
        assert np.array_equal(whole[:cut, :cut] & seen, RELATIONS[name](CODE[:cut]) & seen)


def test_relations_say_what_their_names_say():
    row = ["a", "b", "\n", "a", "b"]
    assert np.argwhere(RELATIONS["after same token"](row)).tolist() == [[3, 1], [4, 2]]
    assert np.argwhere(RELATIONS["same token"](row)).tolist() == [[3, 0], [4, 1]]
    assert np.argwhere(RELATIONS["line break"](row)).tolist() == [[2, 2], [3, 2], [4, 2]]
    assert np.argwhere(RELATIONS["previous"](row)).tolist() == [[1, 0], [2, 1], [3, 2], [4, 3]]


def test_pads_have_no_keys():
    batch = Batch(torch.tensor([[5, 6, 2]]), torch.tensor([[True, True, False]]), torch.tensor([[False, True, False]]))
    text = Text.of(batch, [f"w{i}" for i in range(50)])
    keys, codes = text.keys("token")
    assert [keys[code] for code in codes[0]] == ["w5", "w6", ""] and not text.related("itself")[0, 2].any()
