"""Dictionaries: every gate on numbers worked out by hand; parts stand side by side; a skip is its matrix."""

import pytest
import torch

from graphs.dictionary import Act, Dictionary, Gated, Identity, JumpReLU, Part, ReLU, TopK, skip

DRIVE = torch.tensor([[-1.0, 0.2, 0.5, 2.0]])


@pytest.mark.parametrize(("gate", "wanted"), [
    (ReLU(), [0.0, 0.2, 0.5, 2.0]),
    (JumpReLU(torch.tensor([-2.0, 0.3, 0.3, 0.3])), [-1.0, 0.0, 0.5, 2.0]),
    (TopK(2), [0.0, 0.0, 0.5, 2.0]),
    (Identity(), [-1.0, 0.2, 0.5, 2.0]),
    (Act("relu2"), [0.0, 0.04, 0.25, 4.0]),
])
def test_gates(gate, wanted):
    assert torch.allclose(gate(DRIVE), torch.tensor([wanted]))


def test_topk_of_negative_drives_writes_nothing():
    assert torch.equal(TopK(2)(-DRIVE.abs()), torch.zeros_like(DRIVE))


def test_a_gated_neuron_holds_its_gate_in_the_drive():
    part = Part(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0]), torch.ones(1, 2), Gated("relu", torch.tensor([[0.0, 3.0]]), torch.tensor([-1.0])))
    assert float(part.drive(torch.tensor([1.0, 1.0]))) == (2 + 1) * (3 - 1)
    assert float(part.drive(torch.tensor([1.0, 0.0]))) == 0


def test_parts_stand_side_by_side_and_keep_their_gates():
    generator = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(5, 4, generator=generator), torch.randn(3, 4, generator=generator)
    relu = Part(torch.randn(6, 4, generator=generator), torch.zeros(6), torch.randn(6, 5, generator=generator), JumpReLU(torch.full((6,), 0.1)))
    both = Dictionary((relu, skip(matrix)), torch.ones(5))
    assert both.count == 10 and both.reads.shape == (10, 4)
    assert torch.allclose(both(x), relu.gate(relu.drive(x)) @ relu.write + x @ matrix.T + 1, atol=1e-5)
    few = relu.keep(torch.tensor([1, 4]))
    assert torch.equal(few.gate(few.drive(x)), relu.gate(relu.drive(x))[:, [1, 4]])


def test_a_low_rank_skip_is_the_best_of_its_rank():
    matrix = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    part = skip(matrix, 2)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert len(part.read) == 2 and torch.allclose(part.write.T @ part.read, u[:, :2] * s[:2] @ v[:2], atol=1e-5)
