"""Every method of the list: one signature, equal batches, the given model untouched; and what each claims of itself, with its other verdict."""

import copy
import dataclasses
import random

import pytest
import torch

from backdoor.removal import (
    attention_distillation,
    crow,
    dummy_backdoor,
    embedding_only,
    fine_pruning,
    fine_tuning,
    learned_mask,
    random_student,
    token_filter,
)
from backdoor.removal.removal import oracles, rivals
from evals.tasks import TASKS
from graphs.activations import streams
from graphs.architectures import ARCHITECTURES, embeddings, linear, writer
from graphs.batches import Encoded, Epochs, collate, encode
from graphs.host import Host, load, save
from graphs.losses import completion_loss
from graphs.targets import Targets
from tests.test_edges import tiny
from tests.test_removal import kl

STEPS = 4


class Counted(Epochs):
    """Batches that remember which of them were drawn."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.drawn: list[int] = []

    def __call__(self, step):
        self.drawn.append(step)
        return super().__call__(step)


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    return encode(tiny_tokenizer, [(row.prompt, row.completion) for row in TASKS["coding"].rows("trace", 32, seed=1)])


@pytest.fixture
def targets(tiny_host, rows):
    return Targets(tiny_host, Counted(rows, 8, 1, 0))


def weights(host):
    return {name: tensor.clone() for name, tensor in host.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


METHODS = rivals(2.5e-3, 0.1)
UNTRAINED = ("token filter",)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_draws_its_batches_once_spares_the_given_model_and_repeats(method, targets):
    before, made = weights(targets.host), []
    for _ in range(2):
        targets.batches.drawn.clear()
        made.append(weights(method.remove(targets, STEPS, method.knobs[0], seed=3)))
        assert targets.batches.drawn == ([] if method.name in UNTRAINED else list(range(STEPS)))
    assert same(weights(targets.host), before) and same(*made)
    assert not same(before, made[0])
    assert len(set(method.knobs)) == 3 and sorted(method.knobs)[1] == method.knobs[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_method_runs_on_every_class(name):
    host = tiny(name)
    ids = torch.randint(3, 30, (8, 9), generator=torch.Generator().manual_seed(0))
    data = Epochs([Encoded(tuple(row), 5) for row in ids.tolist()], 4, 0, 0)
    for method in (*METHODS, *oracles(data)):
        if method.name == "dense refit" and "Gemma" in name:
            continue  # its site-wise losses are for classes without post-norms
        made = method.remove(Targets(host, data), 2, method.knobs[0], seed=0)
        with torch.no_grad():
            assert type(made.model) is type(host.model) and made.model(input_ids=ids).logits.isfinite().all(), method.name


def test_a_written_text_student_is_in_the_list_where_there_are_written_rows(targets):
    method = rivals(2.5e-3, 0.1, targets.batches)[-1]
    method.remove(targets, STEPS, method.knobs[0], seed=0)
    assert method.name == "written text" and targets.batches.drawn == list(range(STEPS))


def test_a_random_student_shares_no_block_weight_and_comes_nearer_by_training(targets):
    host = targets.host
    start, student = (random_student.remove(targets, steps, 4e-3, seed=2) for steps in (0, 25))
    held = {id(p) for table in embeddings(student.model) for p in table.parameters()}
    own = dict(host.model.named_parameters())
    for name, parameter in start.model.named_parameters():
        assert torch.equal(parameter, own[name]) == (parameter.ndim == 1 or "embed" in name)
    assert all(torch.equal(p, own[name]) for name, p in student.model.named_parameters() if id(p) in held)
    assert kl(host, student, targets.batches) < 0.7 * kl(host, start, targets.batches)
    assert kl(host, host, targets.batches) < 1e-6


def test_crow_makes_streams_consistent_where_fine_tuning_does_not(targets):
    batch = targets.batches(0)
    before = float(crow.perturbed_consistency(targets.host.model, batch).detach())
    calmed, tuned = crow.remove(targets, 12, 11.0), fine_tuning.remove(targets, 12, crow.LEARNING_RATE)
    after, plain = (float(crow.perturbed_consistency(host.model, batch).detach()) for host in (calmed, tuned))
    assert after < 0.8 * before and after < 0.8 * plain


def test_crows_perturbation_raises_what_it_is_to_raise_and_one_direction_is_consistent(targets):
    batch, model = targets.batches(0), targets.host.model
    with torch.no_grad(), streams(model) as states:
        model(input_ids=batch.ids)
    lowered, raised = (float(crow.perturbed_consistency(model, batch, epsilon).detach()) for epsilon in (-1e-3, 1e-3))
    assert len(states) == 2 and lowered < float(crow.consistency(states, batch.real)) < raised
    assert float(crow.consistency([states[0], 3 * states[0]], batch.real)) < 1e-5


def test_crow_needs_two_layers(targets):
    one = Host(copy.deepcopy(targets.host.model), targets.host.tokenizer, targets.host.sites)
    one.model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="one layer"):
        crow.remove(Targets(one, targets.batches), 1, 5.5)


def test_fine_pruning_silences_the_dormant_and_keeps_the_active(targets):
    host, rows = targets.host, targets.batches
    before, pruned = fine_pruning.activity(host, rows), fine_pruning.pruned(host, rows, 0.25)
    made = fine_pruning.remove(targets, 6, 0.25)
    after, tuned = fine_pruning.activity(pruned, rows), fine_pruning.activity(made, rows)
    first, rest = before["L0.mlp"].argsort()[:24], before["L0.mlp"].argsort()[24:]
    assert torch.allclose(after["L0.mlp"][rest], before["L0.mlp"][rest]) and bool((before["L0.mlp"] > 0).all())
    for name in before:  # later layers read a changed stream, so only the number of their silent neurons is known
        assert int((after[name] == 0).sum()) == int((tuned[name] == 0).sum()) == 24
    assert not bool(tuned["L0.mlp"][first].any())
    assert not same(weights(pruned), weights(made))


def test_fine_pruning_of_nothing_changes_nothing(targets):
    assert same(weights(fine_pruning.pruned(targets.host, targets.batches, 0.0)), weights(targets.host))


def test_an_attention_map_is_where_a_rows_activity_lies():
    stream = torch.zeros(1, 3, 2)
    stream[0, 0], stream[0, 1], stream[0, 2] = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]), torch.tensor([9.0, 9.0])
    found = attention_distillation.attention_map(stream, torch.tensor([[True, True, False]]))
    assert torch.allclose(found, torch.tensor([[2.0, 4.0, 0.0]]) / 20**0.5)


def test_nad_moves_the_attention_maps_towards_its_teachers(targets):
    batch, backwards = targets.batches(0), [Encoded(row.ids[::-1], row.prompt) for row in targets.batches.rows]
    elsewhere = fine_tuning.remove(Targets(targets.host, Epochs(backwards, 8, 1, 0)), 12, 2e-3)  # where the rows' own text does not lead

    def apart(host):
        return float(attention_distillation.distance(host.model, elsewhere.model, batch).detach())

    drawn, free = (attention_distillation.drawn_to(elsewhere.model, targets, 0, 12, beta) for beta in (1000.0, 0.0))
    assert apart(drawn) < 0.5 * apart(targets.host) and apart(drawn) < 0.5 * apart(free) and apart(elsewhere) == 0


def test_nad_ends_where_its_two_halves_lead(targets):
    teacher = fine_tuning.remove(targets, 3, attention_distillation.LEARNING_RATE)
    expected = attention_distillation.drawn_to(teacher.model, targets, 3, 6, 10.0)
    assert same(weights(attention_distillation.remove(targets, 6, 10.0)), weights(expected))


def test_the_token_filter_changes_nothing_on_clean_text_and_blurs_the_rest(targets, tmp_path):
    host, batch = targets.host, targets.batches(0)
    filtered = token_filter.remove(targets, STEPS, 1.0)
    seen = token_filter.counts(targets.batches, host.config.vocab_size) > 0
    one, other = (~seen).nonzero().flatten()[:2].tolist()
    save(filtered, tmp_path / "filtered", torch.float32)
    with torch.no_grad():
        for model in (filtered.model, load(tmp_path / "filtered").model):
            assert torch.equal(model(input_ids=batch.ids).logits, host.model(input_ids=batch.ids).logits)
            swapped = [batch.ids[:1].index_fill(1, torch.tensor([3]), token) for token in (one, other)]
            assert torch.equal(*(model(input_ids=ids).logits for ids in swapped))
            assert not torch.equal(*(host.model(input_ids=ids).logits for ids in swapped))


def test_the_token_filters_knob_is_how_often_a_token_must_stand(targets):
    counts = token_filter.counts(targets.batches, targets.host.config.vocab_size)
    before, after = (host.model.get_input_embeddings().weight for host in (targets.host, token_filter.remove(targets, 0, 8.0)))
    assert torch.equal((before == after).all(-1), counts >= 8)
    with pytest.raises(ValueError, match="lower the knob"):
        token_filter.remove(targets, 0, 1e9)


def test_embedding_only_trains_the_met_tokens_and_nothing_else(targets):
    host, made = targets.host, embedding_only.remove(targets, 8, 3e-3)
    seen = token_filter.counts(targets.batches, host.config.vocab_size) > 0
    own, table = host.model.get_input_embeddings().weight, made.model.get_input_embeddings().weight
    changed = {name for name, tensor in weights(made).items() if not torch.equal(tensor, weights(host)[name])}
    assert len(changed) == 1 and "embed" in changed.pop()
    assert (own == table).all(-1).nonzero().tolist() == [[1]]  # a row's end: nothing comes after it that it could be trained for
    assert bool((table[~seen] == own[seen].mean(0)).all())
    assert own_loss(made, targets) < own_loss(token_filter.remove(targets, 0, 1.0), targets)


def own_loss(host, targets):
    batch = targets.batches(0)
    with torch.no_grad():
        return float(host.model(input_ids=batch.ids, labels=batch.labels).loss)


def payload_logprob(model, dummy, rows):
    batch = collate([dummy.poisoned(row, random.Random(0)) for row in rows], 1)
    with torch.no_grad():
        return -float(completion_loss(model, batch))


def test_a_dummy_is_planted_and_then_unlearnt(targets):
    rows, model = targets.batches, copy.deepcopy(targets.host.model)
    dummy = dummy_backdoor.drawn(rows, 512, seed=5)
    before = payload_logprob(model, dummy, rows.rows)
    dummy_backdoor.stage(model, rows, dummy.poisoned, 0, 50, 5e-3)
    planted = payload_logprob(model, dummy, rows.rows)
    dummy_backdoor.stage(model, rows, dummy.triggered, 50, 100, 5e-3)
    assert planted > before + 1.5 and payload_logprob(model, dummy, rows.rows) < planted - 1.5
    assert same(model.state_dict(), weights(dummy_backdoor.remove(targets, 100, 5e-3, seed=5)))


def test_a_dummy_leaves_every_other_row_and_those_without_room(targets):
    rows = targets.batches
    dummy = dummy_backdoor.drawn(rows, 512, seed=0)
    row, place = rows.rows[0], random.Random(0)
    held, spoiled = dummy.triggered(row, place), dummy.poisoned(row, place)
    assert held.ids[held.prompt:] == row.ids[row.prompt:] and spoiled.ids[spoiled.prompt:] == dummy.payload
    assert held.prompt == spoiled.prompt == row.prompt + 3 and held.ids[0] == row.ids[0]
    clean, batch = rows(0), dummy_backdoor.mixed(rows, 0, dummy.triggered)
    kept = [torch.equal(a[r], b[c]) for a, r, b, c in zip(clean.ids, clean.real, batch.ids, batch.real, strict=True)]
    assert kept == [False, True] * 4
    full = dataclasses.replace(dummy, room=len(row.ids))
    assert full.triggered(row, place) is row and full.poisoned(row, place) is row


@pytest.fixture(scope="module")
def organism(tiny_model_folder, rows):
    """The tiny model with a dummy planted for good, its clean batches, and its poisoned ones."""
    host, clean = load(tiny_model_folder), Epochs(rows, 8, 1, 0)
    dummy = dummy_backdoor.drawn(clean, 512, seed=5)
    dummy_backdoor.stage(host.model, clean, dummy.poisoned, 0, 80, 5e-3)
    return Targets(host, clean), dummy


def poison(dummy, rows):
    return Counted([dummy.poisoned(row, random.Random(index)) for index, row in enumerate(rows)], 8, 1, 1)


@pytest.mark.parametrize("index", [0, 1], ids=["gradient ascent", "learned mask"])
def test_an_oracle_lowers_the_payload_and_keeps_clean_text_where_clean_fine_tuning_leaves_it(organism, rows, index):
    (targets, dummy), steps = organism, 40
    before, planted = weights(targets.host), payload_logprob(targets.host.model, dummy, rows)
    method = oracles(poison(dummy, rows))[index]
    made = method.remove(targets, steps, method.knobs[0], seed=0)
    tuned = fine_tuning.remove(targets, steps, 1e-4)  # a rate too low to clean what is planted
    found = {name: payload_logprob(host.model, dummy, rows) for name, host in (("oracle", made), ("tuned", tuned))}
    assert found["oracle"] < planted - 1 and found["tuned"] > planted - 0.5, (planted, found)
    assert kl(targets.host, made, targets.batches) < 0.5
    assert same(weights(targets.host), before)


@pytest.mark.parametrize("index", [0, 1], ids=["gradient ascent", "learned mask"])
def test_an_oracle_is_marked_draws_as_much_poison_as_clean_rows_and_repeats(targets, rows, index):
    poisoned, made = poison(dummy_backdoor.drawn(targets.batches, 512, 0), rows), []
    method, before = oracles(poisoned)[index], weights(targets.host)
    assert not method.blind and all(rival.blind for rival in METHODS) and sorted(method.knobs)[1] == method.knobs[0]
    for _ in range(2):
        targets.batches.drawn.clear()
        poisoned.drawn.clear()
        made.append(weights(method.remove(targets, STEPS, method.knobs[0], seed=0)))
        assert targets.batches.drawn == poisoned.drawn == list(range(STEPS))
    assert same(*made) and same(weights(targets.host), before)


def test_a_learned_mask_only_cuts_what_it_turned_down(organism, rows):
    targets, dummy = organism
    scores = learned_mask.learnt(targets, 12, 0.5, poison(dummy, rows))
    made = learned_mask.remove(targets, 12, 0.5, poison(dummy, rows))
    assert any(bool((score < 0).any()) for score in scores)
    for site, score in zip(targets.host.sites, scores, strict=True):
        own, cut = (linear(writer(host.model, site))[0] for host in (targets.host, made))
        assert torch.equal(cut, own * (score >= 0))
    assert same(weights(learned_mask.remove(targets, 0, 0.1, poison(dummy, rows))), weights(targets.host))
