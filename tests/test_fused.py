"""The fused local loss is the plain formula, value and gradients, in every precision and at every chunk."""

import pytest
import torch

from graphs import fused


def plain(x, y, w_enc, b_enc, w_dec, b_dec, variance, weight, scale=0.7):
    a = torch.relu(torch.nn.functional.linear(x, w_enc, b_enc))
    guess = a @ w_dec + b_dec
    return (y - guess).square().sum() / variance + weight * torch.tanh(a * scale * w_dec.norm(dim=1)).sum()


def inputs(dtype, tokens=37, features=24, d_in=8, d_out=6):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, d_in), (tokens, d_out), (features, d_in), (features,), (features, d_out), (d_out,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [one.requires_grad_(place > 0) for place, one in enumerate(made)]


def ours(*made):
    *weights, variance, weight = made
    return fused.fused(*weights, 0.7, variance, weight)


def gradients(loss, made):
    value = loss(*made, torch.tensor(3.0, dtype=made[0].dtype), 0.01)
    return [value.detach(), *torch.autograd.grad(2 * value, made[1:])]


@pytest.mark.parametrize("chunk", [5, 37, 256])
def test_value_and_gradients_are_those_of_the_formula(monkeypatch, chunk):
    monkeypatch.setattr(fused, "CHUNK", chunk)
    for got, wanted in zip(gradients(ours, inputs(torch.float64)), gradients(plain, inputs(torch.float64)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_float32_and_autocast_stay_within_their_rounding():
    exact = gradients(plain, inputs(torch.float64))
    for cast, bound in ((False, 1e-5), (True, 3e-2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found = gradients(ours, inputs(torch.float32))
        for got, wanted in zip(found, exact, strict=True):
            assert got.dtype == torch.float32
            assert (got - wanted).norm() <= bound * wanted.norm()


def test_without_gradients_the_value_is_the_same():
    made = inputs(torch.float32)
    with torch.no_grad():
        quiet = ours(*made, torch.tensor(3.0), 0.01)
    assert torch.equal(quiet, ours(*made, torch.tensor(3.0), 0.01).detach())


def test_a_sparse_penalty_is_not_lost_in_the_rounding_of_its_sum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(512, 16, generator=generator), torch.zeros(512, 16)
    w_enc, w_dec = torch.randn(1024, 16, generator=generator) / 4, torch.randn(1024, 16, generator=generator) / 32
    for bias in (-2.5, -3.2):  # a few active features a token; fewer than one
        made = [x, y, w_enc, torch.full((1024,), bias), w_dec, torch.zeros(16)]
        nothing, all_ = torch.tensor(1e30), 1 / 512
        wanted = plain(*made, nothing, all_)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(x, y.bfloat16(), *made[2:], nothing, all_)
        assert 0 < wanted < 3 and abs(found - wanted) <= 0.03 * wanted
