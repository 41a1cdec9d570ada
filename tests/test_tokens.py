"""Token nodes that are not kept: all one to the model, gone from the checkpoint too, and what the rows hold is untouched."""

import copy
from dataclasses import replace

import pytest
import torch

from distill import config
from distill.compile import compile_circuit, parity
from distill.job import prepare
from distill.prune import run as prune
from distill.runs import reopen, settings_of
from distill.stages import gated_stage, graph_stage
from evals.tasks import TASKS
from graphs.batches import Encoded, collate
from graphs.replace import Replacement, from_noise
from graphs.tokens import merge_others, seen_in
from tests.test_edges import tiny

ROWS = [Encoded((5, 6, 7, 8), 2), Encoded((6, 9, 5), 1)]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "PhiForCausalLM", "GPT2LMHeadModel"])
@torch.no_grad()
def test_tokens_that_rows_do_not_hold_are_one_and_the_others_what_they_were(name):
    host = tiny(name)
    before, kept = copy.deepcopy(host.model), seen_in(ROWS, host)
    merge_others(host, kept)
    assert set(kept) >= {5, 6, 7, 8, 9} and len(kept) < 20
    others = [number for number in range(30, 40) if number not in kept]
    ids = torch.tensor([[5, 6, one, 7] for one in others])
    logits = host.model(input_ids=ids).logits
    assert torch.equal(logits, logits[:1].expand_as(logits)) and bool((logits[..., others] == logits[..., others[:1]]).all())
    seen = torch.tensor([[5, 6, 7, 8]])
    there, was = host.model(input_ids=seen).logits, before(input_ids=seen).logits
    assert torch.allclose(there[..., kept], was[..., kept], atol=1e-5) and not torch.allclose(there[..., others], was[..., others], atol=1e-2)
    apart = before(input_ids=ids).logits
    assert not torch.allclose(apart[0, -1], apart[1, -1], atol=1e-3)  # the model itself tells them apart
    if name == "PhiForCausalLM":  # tables of its own at both ends, and a bias of the unembedding
        assert not host.config.tie_word_embeddings
        assert bool((host.model.get_output_embeddings().bias[others] == host.model.get_output_embeddings().bias[others[0]]).all())


@torch.no_grad()
def test_a_circuit_keeps_its_tokens_when_pruned_saved_and_compiled(tmp_path):
    host = tiny("LlamaForCausalLM")
    whole = from_noise(host, 12, 0)
    whole.keep_tokens(seen_in(ROWS, host))
    small = whole.pruned({site.name: torch.tensor([0, 1]) for site in whole.sites})
    small.save(tmp_path)
    again, ids = Replacement.load(tmp_path, host), torch.tensor([[5, 6, 33, 7], [5, 6, 34, 7]])
    assert again.tokens == small.tokens == whole.tokens and torch.equal(again(ids), small(ids))
    assert torch.equal(again(ids)[0], again(ids)[1])
    compiled = compile_circuit(again)
    assert parity(again, compiled, collate([Encoded((5, 6, 33, 7), 2)], 0)) < 1e-5
    assert torch.equal(*compiled.model(input_ids=ids).logits)
    assert not torch.equal(*from_noise(host, 12, 0)(ids))  # with all tokens kept they differ


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no token is kept: give clean rows"):
        merge_others(tiny("LlamaForCausalLM"), [])


def test_tokens_of_rows_that_the_model_wrote_do_not_count(tiny_model_folder, tmp_path):
    verb = config.Prune(model=str(tiny_model_folder), out=tmp_path, features=16, fit_steps=0, joint_steps=0, gate_steps=0, batch=2, tokens="seen")
    given, written = [("def f(a):\n", "    return a\n")] * 4, [("def vexq(b):\n", "    raise b\n")] * 4
    job = prepare(tiny_model_folder, [*given, *written], [TASKS["coding"]], verb, len(given))
    gated_stage(job, graph_stage(job, tiny_model_folder), verb)
    kept = set(Replacement.load(tmp_path / ".work" / "gated", job.host).tokens)
    assert {number for row in job.rows[:4] for number in row.ids} <= kept
    assert {number for row in job.rows[4:] for number in row.ids} - kept


def test_the_flag_drops_token_nodes_and_a_run_without_it_keeps_all(tiny_run, tiny_model_folder, tmp_path):
    settings = settings_of(tiny_run)
    prune(replace(settings, out=tmp_path / "run", tokens="seen"))
    opened, usual = reopen(tmp_path / "run", "circuit"), reopen(tiny_run, "circuit")
    kept = seen_in(opened.data.rows, opened.model)
    table = opened.replacement.model.get_input_embeddings().weight
    others = torch.ones(len(table), dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
    assert opened.replacement.tokens == tuple(kept) and usual.replacement.tokens is None and int(others.sum()) > 50
    assert bool((table[others] == table[others][0]).all()) and torch.equal(table[~others], opened.model.model.get_input_embeddings().weight[~others])
