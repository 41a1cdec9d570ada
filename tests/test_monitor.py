"""A hand-made model: what drives a node in an unfamiliar way is flagged, its clean counterpart is not, and the reason names the parents."""

import math
import random

import pytest
import torch

from graphs.architectures import attention_components, neurons, sites
from graphs.batches import Encoded, collate
from graphs.edges import Reconstruction, contributions, reading
from graphs.familiar import CHOICE, learn
from graphs.host import Host
from graphs.monitor import PARTS, Monitor, conformal, fit
from graphs.refusal import MonitorProcessor, Refused
from tests.test_edges import tiny

EOS, SAID, ASKED, A, B, C, D, U = 2, 5, 6, 11, 12, 13, 14, 15
FILLERS = range(20, 30)
ROW = 12


def hand_made() -> Reconstruction:
    """Width 32. Every token writes 1 on axis 0, and tokens A, B, C, D, U on axes 1 to 5. Attention of layer 0 looks evenly at all tokens.
    Layer 0's neurons 0 to 4 are on where A, B, C, D, U stand anywhere before, and write axes 21 to 25; layer 1's neuron 0 (Z) sums those.
    The model always says the same token."""
    host = tiny("LlamaForCausalLM", hidden_act="relu", num_key_value_heads=4, attention_bias=False)
    model, generator = host.model, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in path else 0.0)
        table = model.get_input_embeddings().weight
        table[:, 0] = 1.0
        for place, token in enumerate((A, B, C, D, U)):
            table[token, 1 + place] = 6.0
        table[FILLERS.start : FILLERS.stop, 10:16] = torch.randn(len(FILLERS), 6, generator=generator)
        first, second = (model.get_submodule(f"model.layers.{i}") for i in range(2))
        first.get_submodule("self_" + "attn").v_proj.weight.copy_(torch.eye(32))
        first.get_submodule("self_" + "attn").o_proj.weight.copy_(torch.eye(32))
        for place in range(5):
            first.mlp.gate_proj.weight[place, 0], first.mlp.up_proj.weight[place, 1 + place] = 1.0, 4.0
            first.mlp.down_proj.weight[21 + place, place] = 1.0
        second.mlp.gate_proj.weight[0, 0], second.mlp.up_proj.weight[0, 21:26] = 1.0, 1.0
        second.mlp.down_proj.weight[30, 0] = 1.0
        model.get_output_embeddings().weight[SAID, 0] = 1.0
    made = Host(model, host.tokenizer, sites(model))
    basis = {s.name: attention_components(model, s) if s.kind == "attention" else neurons(model, s) for s in made.sites}
    return Reconstruction(made, basis)


def row(rng: random.Random, *special: int) -> list[int]:
    """A row that holds `special` somewhere, and ends in the token that asks for an answer."""
    body = [*special, *(rng.choice(FILLERS) for _ in range(ROW - len(special)))]
    rng.shuffle(body)
    return [1, *body, ASKED]


def clean(rng: random.Random) -> list[int]:
    """A and B together or alone, C or D alone: never C with D, and never U."""
    return row(rng, *rng.choice(((), (A,), (B,), (A, B), (A, B), (C,), (D,), (A, C), (B, D))))


@pytest.fixture(scope="module")
def watched() -> Monitor:
    rng = random.Random(0)
    rows = [Encoded((*ids, SAID), len(ids)) for ids in (clean(rng) for _ in range(900))]
    monitor = fit(hand_made(), [collate(rows[i : i + 30], EOS) for i in range(0, len(rows), 30)], ahead=0)
    return monitor.calibrate([one.score for one in monitor.score([clean(rng) for _ in range(300)])], 0.02)


def test_a_pair_that_never_met_is_flagged_though_each_is_familiar(watched):
    rng = random.Random(1)
    bad, alone = watched.score([row(rng, C, D) for _ in range(20)], explain=True), watched.score([row(rng, one) for one in (C, D) for _ in range(10)])
    assert all(one.score > watched.threshold for one in bad) and all(one.reason.part == "pairs" for one in bad)
    assert all(one.tokens[-1].parts[2] > 0.05 for one in bad)
    assert all(one.tokens[-1].parts[2] == 0 for one in alone) and sum(one.score > watched.threshold for one in alone) <= 2
    good = watched.score([row(rng, A, B) for _ in range(20)])
    assert all(one.tokens[-1].parts[2] == 0 for one in good) and sum(one.score > watched.threshold for one in good) <= 2


def test_a_parent_that_never_drove_the_target_is_unfamiliar_and_named(watched):
    found = watched.score([row(random.Random(2), U)], explain=True)[0]
    assert found.score > watched.threshold and found.reason.part == "unfamiliar"
    assert "L0.F4" in {one.parent for one in found.reason.found} | {found.reason.target}
    assert "; here " in found.reason.line() and "usually " in found.reason.line()


def test_a_familiar_parent_far_out_of_range_is_named_with_its_contribution(watched):
    found = watched.score([row(random.Random(3), A, A, A, A, A, A, B)], explain=True)[0]
    assert found.score > watched.threshold and found.tokens[-1].parts[1] > 0.05 and found.reason.part == "range"


def test_the_explanation_gives_contributions_that_are_the_edges(watched):
    subject = watched.subject
    found = watched.score([row(random.Random(4), C, D)], explain=True)[0].reason
    ids = torch.tensor([row(random.Random(4), C, D)])
    seen = subject.trace(ids)
    node = watched.index.find(found.target)
    block = watched.index.block(node)
    at = torch.tensor([ids.shape[1] - 1])
    exact = contributions(subject.host, subject.basis, seen, reading(
        subject.host, subject.basis, seen, subject.host.site(block.name), torch.tensor([node - block.start]), at))
    for term in found.found:
        source = watched.index.block(parent := watched.index.find(term.parent))
        gate = subject.basis[block.name].factor(seen.sites[block.name].x)[0, -1, node - block.start]
        whole = exact[source.name][0, -1, parent - source.start]
        assert float(whole) == pytest.approx(term.contribution * float(gate), abs=1e-4)


def test_the_stated_rate_holds_on_fresh_clean_rows_and_is_not_hollow(watched):
    rng = random.Random(5)
    fresh = [one.score for one in watched.score([clean(rng) for _ in range(500)])]
    assert sum(one > watched.threshold for one in fresh) / 500 <= 0.02 + 4 * math.sqrt(0.02 * 0.98 * (1 / 500 + 1 / 300))


def test_a_conformal_threshold_is_passed_as_often_as_it_says():
    rng = random.Random(6)
    passed = [rng.gauss(0, 1) > conformal([rng.gauss(0, 1) for _ in range(39)], 0.1) for _ in range(4000)]
    assert 0.08 <= sum(passed) / 4000 <= 0.12
    assert conformal([float(i) for i in range(99)], 0.01) == 98
    with pytest.raises(ValueError, match="needs at least 99"):
        conformal([float(i) for i in range(98)], 0.01)


def test_the_processor_ends_the_answer_or_raises_and_leaves_clean_prompts_alone(watched):
    from transformers import LogitsProcessorList

    model, rng = watched.subject.host.model, random.Random(7)
    good, bad = row(rng, A, B), row(rng, C, D)
    with MonitorProcessor(watched, steps=1) as processor:
        out = model.generate(torch.tensor([good, bad]), max_new_tokens=2, do_sample=False, logits_processor=LogitsProcessorList([processor]))
    assert out[0, len(good)] == SAID and out[1, len(bad)] == EOS and set(processor.flagged) == {1}
    with MonitorProcessor(watched, "raise") as processor, pytest.raises(Refused, match="pairs"):
        model.generate(torch.tensor([bad]), max_new_tokens=2, do_sample=False, logits_processor=LogitsProcessorList([processor]))
    told = []
    with MonitorProcessor(watched, "tell", steps=1, tell=lambda row, one: told.append(row)) as processor:
        out = model.generate(torch.tensor([bad]), max_new_tokens=1, do_sample=False, logits_processor=LogitsProcessorList([processor]))
    assert told == [0] and out[0, -1] == SAID
    with pytest.raises(ValueError, match="no threshold"):
        MonitorProcessor(Monitor(watched.subject, watched.learnt, watched.middle, watched.scale))


def test_a_saved_monitor_scores_alike_and_refuses_another_graph(watched, tmp_path):
    rows = [row(random.Random(8), C, D), row(random.Random(8), A)]
    watched.save(tmp_path, {"model": "hand"})
    again = Monitor.load(tmp_path, watched.subject)
    assert again.score(rows) == watched.score(rows) and again.threshold == watched.threshold
    other = tiny("LlamaForCausalLM", intermediate_size=40)
    basis = {s.name: attention_components(other.model, s) if s.kind == "attention" else neurons(other.model, s) for s in other.sites}
    with pytest.raises(ValueError, match="another graph"):
        Monitor.load(tmp_path, Reconstruction(other, basis))


def test_a_choice_that_was_never_made_on_clean_text_is_unfamiliar_whole(watched):
    assert PARTS[0] == "unfamiliar"
    rows = watched.learnt.blocks[CHOICE].rows
    assert int((rows != rows.max()).sum()) == 1 and int(rows[SAID]) == 0
    assert bool(watched.learnt.blocks[CHOICE].unfamiliar[-1].all())


def test_a_choice_that_the_clean_row_itself_does_not_make_is_not_learnt():
    rng, other = random.Random(9), FILLERS.start
    rows = [clean(rng) for _ in range(60)]

    def shares(ends: list[int]) -> float:
        made = [Encoded((*ids, end), len(ids)) for ids, end in zip(rows, ends, strict=True)]
        learnt = learn(hand_made(), [collate(made[i : i + 30], EOS) for i in (0, 30)])
        assert learnt.blocks[CHOICE].count.sum() == sum(end == SAID for end in ends)
        return Monitor(hand_made(), learnt, torch.zeros(3), torch.ones(3), 0).score([rows[0]])[0].tokens[-1].parts[0]

    assert shares([other] * 60) > 0.3 > 0.05 > shares([SAID] * 60)
    assert shares([SAID] * 30 + [other] * 30) < 0.05
