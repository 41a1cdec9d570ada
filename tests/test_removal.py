"""Rivals: each returns a model of its own, leaves the given one alone, and learns what it is told to learn."""

import copy

import pytest
import torch

from backdoor.removal import dense_refit, fine_tuning, undo
from distill.compile import compile_circuit
from distill.rivals import random_student
from evals.tasks import TASKS
from graphs.batches import Epochs, encode
from graphs.host import save
from graphs.losses import divergence
from graphs.replace import from_noise
from graphs.targets import Targets


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
