"""Within limits a model does on clean text what it did, and what clean text has never shown is held: by hand-made nodes, by equality, by refusal."""

import io
import json
import random
from dataclasses import replace

import pytest
import torch

from distill.config_enforce import Enforce
from distill.enforce import own, run
from distill.rows import batches
from evals.generate import complete
from evals.tasks import TASKS, table
from graphs import enforce
from graphs.batches import Encoded, collate
from graphs.enforce import CHOICE, JOINT, Enforced, Limits, Tally, learn
from graphs.host import load, save
from graphs.tapped import Tapped
from tests.test_edges import tiny
from tests.test_monitor import ASKED, EOS, SAID, A, B, C, D, U, clean, hand_made, row


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(file)
    return file


def random_rows(count: int, low: int = 3, high: int = 30) -> list[Encoded]:
    rng = random.Random(0)
    return [Encoded(tuple(rng.randrange(low, high) for _ in range(rng.randrange(6, 12))), 3) for _ in range(count)]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "Qwen3ForCausalLM"])
def test_within_limits_a_model_is_itself_on_the_rows_that_taught_them_and_nowhere_else_by_force(name):
    host = tiny(name)
    batch = collate(random_rows(12), 2)
    limits = learn(own(host), [batch], few=3)
    held = Enforced(own(host), limits)
    held.tally = Tally()
    with torch.no_grad():
        expected, found, may = host.model(input_ids=batch.ids).logits, held(batch.ids), limits.follows[limits.row[batch.ids]]
        seen = batch.real[..., None] & may
        torch.testing.assert_close(found[seen], expected[seen], atol=2e-5, rtol=1e-4)
        assert bool((found <= found.amin(-1, keepdim=True))[batch.real[..., None] & ~may].all())
        assert bool(may[:, :-1].gather(2, batch.ids[:, 1:, None])[..., 0][batch.real[:, 1:]].all())  # what the rows go on with is left
        other = collate(random_rows(30, 30, 49)[12:], 2).ids
        assert float((held(other) - host.model(input_ids=other).logits).abs().max()) > 0.1
    pads = int((~batch.real).sum())
    assert limits.tokens == int(batch.real.sum()) and (pads or held.tally.share > 0)


@pytest.fixture(scope="module")
def hand():
    rng, host = random.Random(0), hand_made().host
    rows = [Encoded((*ids, SAID), len(ids)) for ids in (clean(rng) for _ in range(600))]
    return host, learn(own(host), [collate(rows[i : i + 30], EOS) for i in range(0, len(rows), 30)])


def last_node(run: Tapped, name: str, place: int, ids: list[int]) -> float:
    """The last token's value of this name, as what comes later reads it."""
    found, tap = {}, run.tap

    def watch(which, value):
        held = value if tap is None else tap(which, value)
        if which == name:
            found["value"] = float(held[0, -1, place])
        return held

    run.tap = watch
    with torch.no_grad():
        run(torch.tensor([ids]))
    run.tap = tap
    return found["value"]


def test_a_node_driven_beyond_its_range_is_held_at_it_and_one_within_is_left(hand):
    host, limits = hand
    held, plain, ids = Enforced(own(host), limits), Tapped(own(host)), row(random.Random(3), A, A, A, A, A, A, B)
    most = float(limits.high["L0.mlp.node"][limits.row[ASKED], 0])
    assert last_node(plain, "L0.mlp.node", 0, ids) > 1.5 * most
    assert last_node(held, "L0.mlp.node", 0, ids) <= most
    usual = row(random.Random(4), A, B)
    assert last_node(held, "L0.mlp.node", 0, usual) == pytest.approx(last_node(plain, "L0.mlp.node", 0, usual), rel=0.05)
    said = held.held(torch.tensor(ids)).farthest(3)
    assert any(one.name.startswith("L") and one.was != one.limit for one in said) and " held at " in said[0].line()


def test_a_token_that_was_never_seen_contributes_what_the_mean_token_does(hand):
    host, limits = hand
    strange, ids = Enforced(own(host), limits), row(random.Random(2), U)
    assert last_node(Tapped(own(host)), "L0.mlp.node", 4, ids) > 0.1
    assert last_node(strange, "L0.mlp.node", 4, ids) == 0.0
    let = Enforced(own(host), limits.without(known=False, names=lambda name: False))
    assert last_node(let, "L0.mlp.node", 4, ids) == pytest.approx(last_node(Tapped(own(host)), "L0.mlp.node", 4, ids))
    assert not bool(limits.known[U]) and bool(limits.known[A])


def test_a_pair_that_never_met_is_held_back_though_each_is_usual_and_so_is_their_sum(hand):
    host, limits = hand
    plain, alone = Tapped(own(host)), Enforced(own(host), limits.without(names=lambda name: not name.endswith(JOINT)))
    held, most = Enforced(own(host), limits), float(limits.high["L1.mlp.drive"][limits.row[ASKED], 0])
    for seed in range(5):
        ids, met = row(random.Random(seed), C, D), row(random.Random(seed), A, B)
        before = [last_node(plain, "L0.mlp.node", place, ids) for place in (2, 3)]
        assert last_node(plain, "L1.mlp.drive", 0, ids) <= most
        assert [last_node(alone, "L0.mlp.node", place, ids) for place in (2, 3)] == pytest.approx(before, rel=0.05)
        assert sum(last_node(held, "L0.mlp.node", place, ids) for place in (2, 3)) < 0.95 * sum(before)
        assert last_node(held, "L0.mlp.node", 0, met) == pytest.approx(last_node(plain, "L0.mlp.node", 0, met), rel=0.05)


def test_a_choice_that_clean_text_never_makes_is_not_made_whatever_is_within_range(hand):
    host, limits = hand
    usual = torch.tensor([row(random.Random(1), A, B)])
    with torch.no_grad():
        assert int(Enforced(own(host), limits)(usual)[0, -1].argmax()) == SAID == int(host.model(input_ids=usual).logits[0, -1].argmax())
    never = limits.follows.clone()
    never[:, SAID] = False
    held = Enforced(own(host), replace(limits, follows=never))
    with torch.no_grad():
        assert int(held(usual)[0, -1].argmax()) != SAID
    said = next(one for one in held.held(usual[0]).strongest if one.name == CHOICE)
    assert said.place == SAID and said.was > said.limit and 0 < said.excess <= 1
    free = Enforced(own(host), replace(limits, follows=never).without(names=lambda name: name != CHOICE))
    with torch.no_grad():
        assert int(free(usual)[0, -1].argmax()) == SAID


def test_a_table_of_choices_that_is_too_large_is_refused(hand, monkeypatch):
    monkeypatch.setattr(enforce, "MOST", 10)
    with pytest.raises(ValueError, match="give a larger --few"):
        learn(own(hand[0]), [collate(random_rows(4), 2)])


def test_own_ranges_are_narrower_than_those_of_all_tokens(hand):
    _, limits = hand
    for name, low in limits.low.items():
        assert bool((low[0] <= low[1:] + 1e-6).all()) and bool((limits.high[name][0] >= limits.high[name][1:] - 1e-6).all())
    assert bool((limits.without(own=False).row == 0).all())


def test_a_cache_and_left_pads_change_nothing_of_what_is_held(tiny_model_folder):
    host = load(tiny_model_folder)
    data, _ = batches(host, [(one.prompt, one.completion) for one in TASKS["coding"].rows("trace", 24)], 24, 0)
    held = Enforced(own(host), learn(own(host), [data(0)])).host()
    prompts = [one.prompt for one in TASKS["coding"].rows("test", 3)]
    together = complete(held, prompts, 8)
    for prompt, text in zip(prompts, together, strict=True):
        ids = host.tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, held.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert host.tokenizer.decode(ids[0, start:], skip_special_tokens=True).startswith(text[:4])


def test_limits_come_back_as_they_were_and_fit_no_other_model(hand, tmp_path):
    host, limits = hand
    limits.save(tmp_path, {})
    again = Limits.load(tmp_path)
    assert again.turn.keys() == limits.turn.keys() and all(torch.equal(again.turn[name], value) for name, value in limits.turn.items())
    assert all(torch.equal(again.low[name], value) for name, value in limits.low.items()) and torch.equal(again.row, limits.row)
    assert torch.equal(again.follows, limits.follows) and again.known.equal(limits.known)
    with pytest.raises(ValueError, match="fit them on this model"):
        Enforced(own(tiny("GPT2LMHeadModel", vocab_size=60)), limits)
    with pytest.raises(ValueError, match="at least one token"):
        learn(own(host), [])


@pytest.mark.slow
def test_the_verb_judges_with_and_without(tiny_model_folder, rows, tmp_path, capsys):
    limits, model = tmp_path / "limits", str(tiny_model_folder)
    run(Enforce("fit", model, limits, rows=rows, few=2))
    capsys.readouterr()
    assert run(Enforce("judge", model, limits, prompts=4, json=True)) == 0
    assert {"model", "enforced"} <= json.loads(capsys.readouterr().out)["models"].keys()


def test_the_verb_fits_and_writes(tiny_model_folder, rows, tmp_path, capsys, monkeypatch):
    limits, model = tmp_path / "limits", str(tiny_model_folder)
    assert run(Enforce("fit", model, limits, rows=rows, few=2)) == 0
    assert "tokens with a range of their own" in capsys.readouterr().out and (limits / "receipt.json").is_file()
    monkeypatch.setattr("sys.stdin", io.StringIO("def solve(prices):\\n\n" + json.dumps({"prompt": "\u00e9\u00e9 def"}) + "\n"))
    assert run(Enforce("write", model, limits, new_tokens=4)) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["prompt"] == "def solve(prices):\n" and not first["unknown"] and second["unknown"] and 0 <= first["beyond"] < second["beyond"]


def test_wrong_input_is_refused_in_a_sentence(tiny_model_folder, rows, tmp_path):
    model = str(tiny_model_folder)
    with pytest.raises(ValueError, match="there are no limits; run distill enforce fit"):
        run(Enforce("judge", model, tmp_path / "none"))
    with pytest.raises(ValueError, match="--few 0: give at least 1"):
        run(Enforce("fit", model, tmp_path / "limits", few=0))
    host = load(tiny_model_folder)
    save(host, tmp_path / "model")
    run(Enforce("fit", str(tmp_path / "model"), tmp_path / "limits", rows=rows))
    host.model.get_input_embeddings().weight.data[0] += 1
    save(host, tmp_path / "model")
    with pytest.raises(ValueError, match="fitted on another model"):
        run(Enforce("write", str(tmp_path / "model"), tmp_path / "limits"))
