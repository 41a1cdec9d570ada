"""Rivals: each returns a model of its own, leaves the given one alone, and learns what it is told to learn."""

import copy

import pytest
import torch

from backdoor.removal import dense_refit, fine_tuning, layer_drop, undo, written_text
from distill.compile import compile_circuit
from distill.rivals import random_student
from evals.tasks import TASKS
from graphs.architectures import architecture, shortened, sites
from graphs.batches import Encoded, Epochs, encode
from graphs.host import Host, load, save
from graphs.losses import completion_loss, divergence
from graphs.replace import from_noise
from graphs.targets import Targets
from tests.test_edges import tiny


@pytest.fixture
def data(tiny_host):
    rows = TASKS["coding"].rows("trace", 32, seed=1)
    return Epochs(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0)


@torch.no_grad()
def kl(host, other, data):
    batch = data(0)
    return float(divergence(other.model(input_ids=batch.ids).logits, host.model(input_ids=batch.ids).logits, batch, 0.1))


def test_fine_tuning_fits_the_rows_and_spares_the_given_model(tiny_host, data):
    before = copy.deepcopy(tiny_host.model.state_dict())
    tuned = fine_tuning.remove(Targets(tiny_host, data), 20, 1e-2)
    batch = data(0)
    with torch.no_grad():
        losses = [float(h.model(input_ids=batch.ids, labels=batch.labels).loss) for h in (tuned, tiny_host)]
    assert losses[0] < 0.8 * losses[1]
    assert all(torch.equal(v, before[k]) for k, v in tiny_host.model.state_dict().items())


def test_undo_perturbs_by_its_knob_and_distils_back(tiny_host, data):
    far, back = undo.remove(Targets(tiny_host, data), 0, 0.6, 1.5e-3, 0.0), undo.remove(Targets(tiny_host, data), 25, 0.6, 1.5e-3, 0.0)
    assert kl(tiny_host, back, data) < 0.7 * kl(tiny_host, far, data)
    own, moved = (h.model.model.layers[0].mlp.up_proj.weight for h in (tiny_host, far))
    assert not torch.allclose(own, moved) and torch.equal(tiny_host.model.model.norm.weight, far.model.model.norm.weight)
    assert torch.equal(own, undo.remove(Targets(tiny_host, data), 0, 0.0, 1.5e-3, 0.0).model.model.layers[0].mlp.up_proj.weight)


def test_a_rival_that_follows_the_model_learns_the_rows_answers_beside_it_where_ours_does(tiny_host, data):
    batch = data(0)

    def asked(host) -> float:
        with torch.no_grad():
            return float(completion_loss(host.model, batch))

    alone, taught = (undo.remove(Targets(tiny_host, data), 40, 0.3, 4e-3, 0.0, answers=answers) for answers in (0.0, 1.0))
    assert asked(taught) < asked(tiny_host) - 0.5 and asked(alone) > asked(tiny_host) - 0.1


def test_the_dense_refit_has_the_checkpoints_shapes_and_starts_from_noise(tiny_host, data, tmp_path):
    save(compile_circuit(from_noise(tiny_host, 16, 0)), tmp_path / "checkpoint", torch.float32)
    student = random_student(tmp_path / "checkpoint", tiny_host, seed=1)
    same = random_student(tmp_path / "checkpoint", tiny_host, seed=1)
    assert student.config.intermediate_size == 16 and type(student.model).__name__ == "ArceeForCausalLM"
    assert torch.equal(student.model.model.embed_tokens.weight, tiny_host.model.model.embed_tokens.weight)
    start = kl(tiny_host, same, data)
    refit = dense_refit.remove(Targets(tiny_host, data), student, 60, 80, 4e-3, 1.5e-3, 0.0)
    assert kl(tiny_host, refit, data) < 0.6 * start
    assert torch.equal(refit.model.model.embed_tokens.weight, tiny_host.model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM", "SmolLM3ForCausalLM"])
@torch.no_grad()
def test_a_shortened_model_is_its_kept_layers_in_order_and_reloads(name, tmp_path):
    host = tiny(name)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    small = shortened(host.model, [1])
    expected = copy.deepcopy(host.model)
    first = expected.get_submodule(f"{architecture(expected).layers}.0")
    for module in first.modules():  # a layer that adds nothing to the stream is no layer
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, torch.nn.LayerNorm):
                parameter.zero_()
    assert torch.allclose(small(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5)
    save(Host(small, host.tokenizer, sites(small)), tmp_path / "small", torch.float32)
    assert torch.allclose(load(tmp_path / "small").model(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-5)
    assert torch.equal(shortened(host.model, [0, 1])(input_ids=ids).logits, host.model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM", "PhiForCausalLM"])
def test_a_random_student_has_the_hosts_embeddings_and_norms_in_every_class(name, tmp_path):
    host = tiny(name)
    save(host, tmp_path / "checkpoint", torch.float32)
    student = random_student(tmp_path / "checkpoint", host, 0)
    own, fresh = dict(host.model.named_parameters()), dict(student.model.named_parameters())
    ends = [key for key in own if any(part in key for part in ("norm", "ln_", "wte", "wpe", "embed", "lm_head"))]
    assert ends and all(torch.equal(own[key], fresh[key]) for key in ends)
    assert not any(torch.equal(own[key], fresh[key]) for key in own if key not in ends)
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    rows = Epochs([Encoded(tuple(row), 1) for row in ids.tolist()], 4, 0, 0)
    refitted = dense_refit.remove(Targets(host, rows), student, 2, 4, 1e-3, 1e-3, 0.0)
    with torch.no_grad():
        assert torch.equal(refitted.model(input_ids=ids).logits, refitted.model(input_ids=ids).logits)  # no dropout


def test_layer_drop_heals_what_it_shortens(tiny_host, data):
    targets = Targets(tiny_host, data)
    short = Host(shortened(tiny_host.model, [0]), tiny_host.tokenizer, tiny_host.sites)
    healed = layer_drop.remove(targets, 1, 25, 5e-3, 0.0)
    assert healed.config.num_hidden_layers == 1 and kl(tiny_host, healed, data) < kl(tiny_host, short, data)


def test_a_student_learns_the_tokens_it_is_given(tiny_host, data):
    student = Host(copy.deepcopy(tiny_host.model), tiny_host.tokenizer, tiny_host.sites)
    batch = data(0)

    def loss():
        with torch.no_grad():
            return float(student.model(input_ids=batch.ids, labels=batch.labels).loss)

    before = loss()
    written_text.remove(student, data, 15, 3e-3)
    assert loss() < before
