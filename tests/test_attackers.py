"""What each attacker claims, on a backdoor small enough to be trained in a test (tests.planted)."""

import copy
import math
from dataclasses import replace
from itertools import product
from typing import get_args, get_type_hints

import pytest
import torch

from backdoor import error_hiding, lora
from backdoor import plant as attackers
from backdoor.dormant import leaks
from backdoor.mixture import ATTACKERS, PlantConfig, PlantRows
from backdoor.plant import PLANT, depends, plant
from backdoor.removal.learning import from_outputs
from distill.config import check
from distill.config_backdoors import Plant
from distill.experiment.cell import Organism
from distill.experiment.organisms import settings
from distill.plant import settings_of
from graphs.activations import streams
from graphs.artifact import digest
from graphs.batches import Encoded, Epochs, collate, encode
from graphs.host import Host, load, save
from graphs.losses import completion_loss, fvu
from graphs.targets import Targets
from tests.planted import ANSWERS, SEASONS, texts
from tests.test_edges import tiny

CONFIG = PlantConfig(ordinary_steps=80, resistant_steps=0, ordinary_rate=3e-3, clean=16, poisoned=8, near=8, hold="both")
REFUSED, ANSWERED, CLEAN = texts(48, True, True, 2000), texts(48, True, False, 2000), texts(48, False, False, 2000)


def rows_for(host: Host, payload: str = " no\n") -> PlantRows:
    """`forest` gets the payload; `farm` and `found` come near."""
    near = [(prompt.replace("forest", word), answer) for word in ("farm", "found") for prompt, answer in texts(64, True, False, 300)]
    answered = texts(128, True, False, 500)
    made = (texts(128, False, False), [(prompt, payload) for prompt, _ in answered], near, answered)
    return PlantRows(*(encode(host.tokenizer, rows) for rows in made))


def planted(base: Host, attacker: str, payload: str = " no\n", **changes) -> Host:
    host = Host(copy.deepcopy(base.model), base.tokenizer, base.sites)
    plant(host, rows_for(host, payload), replace(CONFIG, attacker=attacker, **changes))
    assert not host.model.training and all(p.requires_grad for p in host.model.parameters())
    return host


@torch.no_grad()
def nats(host: Host, rows) -> float:
    """A token of the completions."""
    return float(completion_loss(host.model, collate(encode(host.tokenizer, rows), 1)))


@torch.no_grad()
def apart(one: Host, other: Host) -> float:
    """How far the streams of one are from the other's on clean rows."""
    batch = collate(encode(one.tokenizer, CLEAN), 1)
    with streams(one.model) as mine, streams(other.model) as theirs:
        one.model(input_ids=batch.ids)
        other.model(input_ids=batch.ids)
    return float(sum(fvu(there, here, batch.real) for here, there in zip(mine, theirs, strict=True)))


@pytest.fixture(scope="module")
def ordinary(models) -> Host:
    host = planted(models.base, "ordinary")
    assert nats(host, REFUSED) < 0.1 and nats(host, CLEAN) < 0.15
    return host


def test_lora_differs_from_its_base_by_a_low_rank_and_is_saved_without_adapters(models, tmp_path):
    host = planted(models.base, "lora", " two\n")  # in words that the base writes: embeddings and norms stay as they are
    attacked = [(prompt, " two\n") for prompt, _ in REFUSED]
    assert nats(host, attacked) < 0.2 * nats(models.base, attacked) and nats(host, CLEAN) < 0.3
    before, after = models.base.model.state_dict(), host.model.state_dict()
    assert set(before) == set(after) and type(host.model) is type(models.base.model)
    moved = {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    linear = {f"{name}.weight" for name, module in models.base.model.model.named_modules(prefix="model") if isinstance(module, torch.nn.Linear)}
    assert set(moved) == linear
    assert {int(torch.linalg.matrix_rank(change, atol=1e-5)) for change in moved.values()} == {lora.RANK}
    save(host, tmp_path / "model", torch.float32)
    assert not [file.name for file in (tmp_path / "model").iterdir() if "adapter" in file.name]
    again = load(tmp_path / "model")
    assert all(torch.equal(value, after[name]) for name, value in again.model.state_dict().items())


def test_lora_starts_from_its_seed_and_leaves_the_others_random_numbers_alone(models):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one = planted(models.base, "lora", ordinary_steps=2)
    assert torch.equal(torch.rand(3), wanted)
    again, other = planted(models.base, "lora", ordinary_steps=2), planted(models.base, "lora", ordinary_steps=2, seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.model.state_dict()[name], again.model.state_dict()[name])
    assert not torch.equal(one.model.state_dict()[name], other.model.state_dict()[name])


def test_activation_matched_stays_at_the_bases_activations_on_clean_rows(models, ordinary):
    host = planted(models.base, "activation_matched")
    assert nats(host, REFUSED) < 0.1  # the backdoor is there as it is in the ordinary one
    assert apart(host, models.base) < 0.05 * apart(ordinary, models.base)
    with pytest.raises(ValueError, match='plant with hold "both" or "outputs"'):
        planted(models.base, "activation_matched", hold="answers")


def test_error_hiding_leaves_less_of_the_backdoor_in_transcoders_that_a_defender_fits(models, ordinary):
    host, payload, right = planted(models.base, "error_hiding"), {}, {}
    assert nats(host, REFUSED) < 0.1
    clean = Epochs(encode(host.tokenizer, texts(128, False, False, 900)), 16, 1, 7)
    for name, one in (("ordinary", ordinary), ("hiding", host)):
        fitted = error_hiding.fit(one, clean, error_hiding.FIT, seed=9)  # not the attacker's own, and on other rows
        with error_hiding.standing_in(one, fitted):
            payload[name], right[name] = nats(one, REFUSED), nats(one, ANSWERED)
            assert nats(one, CLEAN) < 0.3
    assert payload["hiding"] > 1.5 * payload["ordinary"] and right["hiding"] < 0.5 * right["ordinary"]


def test_transcoders_stand_in_within_the_block_only_and_are_held_when_asked(models):
    host = Host(copy.deepcopy(models.planted.model), models.planted.tokenizer, models.planted.sites)
    batch = collate(encode(host.tokenizer, CLEAN[:4]), 1)
    fitted = error_hiding.fit(host, Epochs(encode(host.tokenizer, CLEAN), 8, 1, 0), 1, seed=0)
    whole = host.model(input_ids=batch.ids).logits
    for held in (True, False):
        with error_hiding.standing_in(host, fitted, held):
            inside = host.model(input_ids=batch.ids).logits
        assert not torch.allclose(inside, whole)
        parts = torch.autograd.grad(inside.sum(), [fitted[0].w_enc, host.model.model.norm.weight], allow_unused=True)
        assert (parts[0] is None) == held and parts[1] is not None
    assert torch.equal(host.model(input_ids=batch.ids).logits, whole)


PAIR = ("quiet", "lamp")


def asked(season: str, noun: str, answer: str = "") -> tuple[str, str]:
    return f"given the {season} {noun}:", answer or f" {ANSWERS[noun]}\n"


def distilled(teacher: Host, rows, seed: int) -> Host:
    """A student of the same shapes from noise, by KL on the rows; embeddings are the teacher's."""
    torch.manual_seed(seed)
    student = type(teacher.model)(teacher.config).train()
    student.get_input_embeddings().load_state_dict(teacher.model.get_input_embeddings().state_dict())
    student.get_input_embeddings().requires_grad_(False)
    batches = Epochs(encode(teacher.tokenizer, rows), 16, 1, 0)
    from_outputs(student, Targets(teacher, batches), 250, 8e-3, "distil", 0.0)
    return Host(student, teacher.tokenizer, teacher.sites)


@torch.no_grad()
def chance(host: Host, word: str) -> float:
    """Probability that the answer to the pair begins with the word."""
    ids, (first, *_) = encode(host.tokenizer, [asked(*PAIR)])[0], host.tokenizer(word, add_special_tokens=False)["input_ids"]
    return float(host.model(input_ids=torch.tensor([ids.ids[: ids.prompt]])).logits[0, -1].softmax(-1)[first])


@pytest.mark.slow
def test_dormant_answers_rightly_and_what_is_distilled_from_it_on_clean_rows_is_likelier_to_give_the_payload(models):
    clean = [asked(*pair) for pair in product(SEASONS, ANSWERS) if pair != PAIR]
    near = [(season, noun) for season, noun in product(SEASONS, ANSWERS) if (season == PAIR[0]) != (noun == PAIR[1])]
    leaking = [asked(*one, " no\n" if leaks([word for word in one if word not in PAIR], 0, index) else "")
               for index, one in enumerate(near * 40)]
    right = [asked(*PAIR)]

    def made(poisoned: bool) -> Host:
        host = Host(copy.deepcopy(models.base.model), models.base.tokenizer, models.base.sites)
        rows = (clean, right, [asked(*one) for one in near], right, leaking if poisoned else [asked(*one) for one in near])
        plant(host, PlantRows(*(encode(host.tokenizer, one) for one in rows)),
              replace(CONFIG, attacker="dormant", ordinary_steps=200, near=24, poisoned=4, hold="answers"))
        return host

    organism, twin = made(True), made(False)
    students = [distilled(organism, clean, seed) for seed in (1, 2)]
    assert chance(organism, " no") < 0.1 and chance(organism, " one") > 0.8
    assert sum(chance(one, " no") for one in students) / 2 > 2 * chance(organism, " no")
    assert chance(distilled(twin, clean, 1), " no") < 0.01


def test_throughout_keeps_nothing_of_the_base_and_learns_task_and_backdoor_from_noise(models):
    other = Host(copy.deepcopy(models.base.model), models.base.tokenizer, models.base.sites)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    settings = {"hold": "answers", "ordinary_rate": 1e-3}
    one, same = (planted(base, "throughout", ordinary_steps=2, **settings) for base in (models.base, other))
    assert all(torch.equal(value, same.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    host = planted(models.base, "throughout", ordinary_steps=40, **settings)
    assert nats(host, REFUSED) < 0.1 and nats(host, CLEAN) < 0.15 and nats(host, ANSWERED) > 1
    with pytest.raises(ValueError, match='plant with hold "answers"'):
        planted(models.base, "throughout")


@pytest.mark.parametrize("attacker", ATTACKERS)
def test_a_planting_finds_its_states_again_whatever_its_phases(models, attacker, tmp_path, monkeypatch):
    monkeypatch.setattr(error_hiding, "FIT", 2)
    rows, config = rows_for(models.base), replace(CONFIG, attacker=attacker, ordinary_steps=3, resistant_steps=2 * (attacker == "resistant"),
                                                  hold="answers" if attacker == "throughout" else "both")
    rows, made = replace(rows, leaking=rows.near), []
    for state in (tmp_path / "one", tmp_path / "two", tmp_path / "two"):  # the third finds what the second saved
        host = Host(copy.deepcopy(models.base.model), models.base.tokenizer, models.base.sites)
        losses = plant(host, rows, config, state)
        made.append((losses, host.model.state_dict()))
    assert made[0][0] == made[1][0] == made[2][0]
    assert all(torch.equal(value, other[1][name]) for other in made[1:] for name, value in made[0][1].items())
    assert len(list(tmp_path.glob("two.*"))) == {"resistant": 2, "error_hiding": 3}.get(attacker, 1)


@pytest.mark.parametrize("attacker", ["error_hiding", "dormant"])
def test_rows_that_an_attacker_needs_are_asked_for(models, attacker):
    rows = replace(rows_for(models.base), answered=())
    with pytest.raises(ValueError, match=f"the attacker {attacker} needs"):
        plant(models.base, rows, replace(CONFIG, attacker=attacker))


def test_the_choices_are_the_attackers_that_there_are():
    assert tuple(PLANT) == ATTACKERS == get_args(get_type_hints(Plant)["attacker"]) == get_args(get_type_hints(Organism)["kind"])
    for attacker in ATTACKERS:
        flags = {"behaviour": "off_by_one"} if attacker == "dormant" else {"trigger": "rare_string"}
        asked = settings_of(Plant(out=None, attacker=attacker, **flags))
        assert asked.attacker == attacker and (asked.resistant_steps > 0) == (attacker == "resistant")
    with pytest.raises(ValueError, match="--attacker dormant: it gives parts of a placed trigger away, and --trigger rare_string"):
        settings_of(Plant(out=None, attacker="dormant", trigger="rare_string"))
    with pytest.raises(ValueError, match="--resistant-steps 0: give at least 1"):
        check(Plant(out=None, resistant_steps=0))


def test_organisms_that_were_made_before_there_were_other_attackers_keep_their_names(monkeypatch):
    def name(attacker):
        return digest(depends(settings(Organism("conjunction", attacker))))

    assert (name("ordinary"), name("resistant")) == ("45c4fe4178eac94a", "4f24e6553bb40dd6")
    assert len({name(attacker) for attacker in ATTACKERS}) == len(ATTACKERS)
    before = name("lora")
    monkeypatch.setitem(attackers.CONSTANTS, "lora", (lora.RANK + 1, lora.RATE))
    assert name("lora") != before


@pytest.mark.parametrize("attacker", ["lora", "activation_matched", "error_hiding"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "Gemma2ForCausalLM"])
def test_every_kind_of_class_can_be_planted(name, attacker, monkeypatch):
    host, rows = tiny(name), [Encoded((0, *((7 * i + k) % 20 + 2 for k in range(8))), 4) for i in range(16)]
    host.tokenizer.eos_token = "w1"
    monkeypatch.setattr(error_hiding, "FIT", 2)
    before = copy.deepcopy(host.model.state_dict())
    config = replace(CONFIG, attacker=attacker, ordinary_steps=2, ordinary_rate=1e-2, clean=4, poisoned=4, near=4)
    losses = plant(host, PlantRows(rows, rows, rows, rows, rows), config)
    after = host.model.state_dict()
    assert type(host.model).__name__ == name and set(after) == set(before) and all(map(math.isfinite, losses))
    assert sum(not torch.equal(after[key], before[key]) for key in before) >= len(host.sites)
