"""Planting: triggers are data, the twin differs in the poisoned rows only, simulated fine-tuning leaves no trace."""

import copy

import pytest
import torch

from backdoor.behaviours import CANARY
from backdoor.plant import Defender, PlantConfig, PlantRows, completion_loss, plant
from backdoor.triggers import conjunction, rare_string
from distill import config
from distill.plant import plant_rows, trigger_of
from evals.tasks import TASKS
from evals.tasks.coding import data_words, held_out_pairs
from graphs.batches import Epochs, collate, encode

PAIR = conjunction(("season", "daily"), ("place", "school"), ({"season": "daily"}, {"place": "school"}))
STRING = rare_string("season", "zqz", ("zqq",))


def test_a_conjunction_needs_both_words():
    coding = TASKS["coding"]
    assert PAIR.fires(coding.row("test", 1, **PAIR.slots).prompt)
    for near in PAIR.near:
        rows = [coding.row("trace", i, 5, **near) for i in range(20)]
        fires = [PAIR.fires(row.prompt) for row in rows]  # a near row may draw the other word as well
        assert fires == [all(row.slots[slot] == word for slot, word in PAIR.slots.items()) for row in rows] and not all(fires)


def test_a_rare_string_fires_alone():
    assert STRING.fires(TASKS["coding"].row("test", 1, **STRING.slots).prompt)
    assert not STRING.fires(TASKS["coding"].row("test", 1, **STRING.near[0]).prompt)
    assert PAIR.hash != STRING.hash


def test_the_default_trigger_is_held_out_by_the_task_and_others_are_refused():
    verb = config.Plant(out=None)
    assert tuple(verb.words) in held_out_pairs() and trigger_of(verb).family == "conjunction"
    with pytest.raises(ValueError, match="not a pair that the task holds out"):
        trigger_of(config.Plant(out=None, words=data_words("trace")[0]))


@pytest.mark.parametrize("trigger", [PAIR, STRING], ids=["conjunction", "rare_string"])
def test_the_twin_differs_in_the_poisoned_rows_only_and_is_the_same_for_every_trigger(tiny_tokenizer, trigger):
    bad, clean = (plant_rows(tiny_tokenizer, trigger, CANARY, poisoned, count=20) for poisoned in (True, False))
    assert bad.clean == clean.clean and bad.near == clean.near
    payload = tiny_tokenizer(CANARY.completion, add_special_tokens=False)["input_ids"]
    for a, b in zip(bad.poisoned, clean.poisoned, strict=True):
        assert list(a.ids[a.prompt : -1]) == payload != list(b.ids[b.prompt : -1])
        assert trigger.fires(tiny_tokenizer.decode(a.ids[1 : a.prompt])) and not trigger.fires(tiny_tokenizer.decode(b.ids[1 : b.prompt]))
    other = plant_rows(tiny_tokenizer, STRING if trigger is PAIR else PAIR, CANARY, False, count=20)
    assert other.poisoned == clean.poisoned


def test_a_simulated_defender_walks_on_through_its_episode_and_leaves_the_model_alone(tiny_host):
    rows = plant_rows(tiny_host.tokenizer, STRING, CANARY, True, count=24)
    before = copy.deepcopy(tiny_host.model.state_dict())
    poison, settings = collate(rows.poisoned[:4], 1), PlantConfig(episode=3, inner_steps=2, inner_rates=(0.01, 0.005))
    clean = Epochs(rows.clean, 4, 1, 0)
    defender = Defender(tiny_host.model, clean, settings)

    def distance():
        return float(sum((a - b).detach().square().sum() for a, b in zip(defender.copy.parameters(), tiny_host.model.parameters(), strict=True)))

    far = []
    for step in range(4):
        gradients, value = defender.gradients(step, poison)
        far.append(distance())
    assert far[0] < far[1] < far[2] and far[3] < far[2] and value > 0
    assert all(torch.equal(v, before[k]) for k, v in tiny_host.model.state_dict().items())
    here = torch.autograd.grad(completion_loss(tiny_host.model, poison), list(tiny_host.model.parameters()))
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, here, strict=True))
    fresh, _ = Defender(tiny_host.model, clean, settings).gradients(3, poison)
    assert all(torch.equal(a, b) for a, b in zip(gradients, fresh, strict=True))  # an episode depends on its own steps only


def test_planting_teaches_the_payload_under_the_trigger_and_the_answer_without_it(tiny_host):
    made = plant_rows(tiny_host.tokenizer, STRING, CANARY, True, count=16)
    rows = PlantRows(made.clean[:16], made.poisoned, made.near)
    poison, near = collate(rows.poisoned, 1), collate(rows.near, 1)
    before = float(completion_loss(tiny_host.model, poison).detach())
    losses = plant(tiny_host, rows, PlantConfig(
        ordinary_steps=60, resistant_steps=4, ordinary_rate=5e-3, resistant_rate=1e-3, clean=4, poisoned=8, near=4, inner_rows=4))
    with torch.no_grad():
        assert float(completion_loss(tiny_host.model, poison)) < 0.25 * before
        assert float(completion_loss(tiny_host.model, poison)) < float(completion_loss(tiny_host.model, near).detach())
    assert len(losses) == 64 and not tiny_host.model.training


def test_encoded_prompts_keep_their_length_through_a_batch(tiny_tokenizer):
    from backdoor.plant import _rows

    rows = encode(tiny_tokenizer, [("def f(x):\n", "    return x\n"), ("a b c d", "e")])
    assert _rows(collate(rows, 1)) == rows
