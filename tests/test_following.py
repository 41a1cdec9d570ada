"""The loss in chunks is the plain formula, value and gradient, whatever the chunk, the precision and the number of logits."""

import pytest
import torch

from graphs import following
from graphs.batches import Batch


def plain(logits, target, batch, prompt_weight, sure, temperature=1.0, answers=0.0):
    predicts = batch.real[:, 1:]
    q, p = ((one / temperature)[:, :-1][predicts].log_softmax(-1) for one in (logits, target))
    known = batch.completion[:, 1:][predicts] | (target[:, :-1][predicts].softmax(-1).amax(-1) > sure)
    weight = torch.where(known, 1.0, prompt_weight)
    kl = ((p.exp() * (p - q)).sum(-1) * weight).sum() / weight.sum()
    labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
    answer = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    return temperature**2 * kl + answers * answer


def inputs(dtype=torch.float64, rows=5, tokens=9, vocabulary=23):
    generator = torch.Generator().manual_seed(0)
    logits, target = (3 * torch.randn(rows, tokens, vocabulary, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    place, length = torch.arange(tokens), torch.tensor([9, 4, 7, 9, 5])[:, None]
    real = place < length
    return logits.requires_grad_(), target, Batch(ids, real, real & (place >= length - 3), tuple(range(rows)))


def gradients(loss, logits, *more):
    value = loss(logits, *more)
    return value.detach(), torch.autograd.grad(2 * value, logits)[0]


@pytest.mark.parametrize("chunk", [1, 100, 1 << 16])
@pytest.mark.parametrize("asked", [(0.1, 1.0), (0.0, 0.5), (0.1, 0.3, 2.0, 0.7), (1.0, 1.0, 1.0, 1.0)])
def test_value_and_gradient_are_those_of_the_formula(monkeypatch, chunk, asked):
    monkeypatch.setattr(following, "CHUNK", chunk)
    for got, wanted in zip(gradients(following.following, *inputs(), *asked), gradients(plain, *inputs(), *asked), strict=True):
        torch.testing.assert_close(got, wanted)


def test_other_weights_other_loss():
    values = [following.following(*inputs(), *asked).item() for asked in ((0.1, 1.0), (0.5, 1.0), (0.1, 0.3), (0.1, 1.0, 2.0), (0.1, 1.0, 1.0, 1.0))]
    assert len({round(value, 6) for value in values}) == len(values)


def test_half_precision_logits_get_their_gradient_in_it():
    exact = gradients(plain, *inputs(), 0.1, 0.5, 2.0, 1.0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        value, gradient = gradients(following.following, *inputs(dtype), 0.1, 0.5, 2.0, 1.0)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert abs(value - exact[0]) <= bound * exact[0]
        assert (gradient - exact[1]).norm() <= bound * exact[1].norm()


def test_without_gradients_the_value_is_the_same():
    made = inputs()
    with torch.no_grad():
        quiet = following.following(*made, 0.1, 0.5, 2.0, 1.0)
    assert torch.equal(quiet, following.following(*made, 0.1, 0.5, 2.0, 1.0).detach())
