"""The local loss of a transcoder and its gradients in one pass over the tokens.

    loss = sum |y - guess|^2 / variance + weight sum_f tanh(a_f size_f)       a = relu(w_enc x + b_enc), guess = w_dec' a + b_dec

Since the loss is known to be what is minimised, each chunk of tokens goes forward and back while it is in the cache, as fused
cross-entropy kernels do (Hsu et al. 2024, "Liger kernel"): between the matrix products, which are the same as in the plain formula, nothing
is read from memory or written to it twice. tanh(z) is computed as 2 sigmoid(2 z) - 1, which this is several times faster than and within
1e-7 of. Autocast is honoured; the result is the plain formula's but for rounding (tests/test_fused.py).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 256
"""Tokens at a time: activations of a few thousand features stay in the second-level cache."""


def fused(
    x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], w_enc: Float[Tensor, "feature d_in"], b_enc: Float[Tensor, "feature"],
    w_dec: Float[Tensor, "feature d_out"], b_dec: Float[Tensor, "d_out"], size: Float[Tensor, "feature"], variance: Float[Tensor, ""],
    weight: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The loss. size: what activations are measured in; variance: what the squared error is divided by; no gradient flows into it or x."""
    return _Loss.apply(x, y, w_enc, b_enc, w_dec, b_dec, size, float(variance), float(weight))


class _Loss(torch.autograd.Function):
    """Forward finds the gradient of what enters the gates too; backward is the matrix products with it."""

    @staticmethod
    def forward(ctx, x, y, w_enc, b_enc, w_dec, b_dec, size, variance, weight):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else w_enc.dtype
        trained = any(ctx.needs_input_grad)
        with torch.autocast(kind, enabled=False):
            x, enc, dec, bias = x.to(dtype), w_enc.to(dtype), w_dec.to(dtype), b_enc.to(dtype)
            active = x.new_empty(len(x), len(enc))
            back, slope = torch.empty_like(active) if trained else None, torch.empty_like(y, dtype=dtype)
            lost, fired, d_size = y.new_zeros(()), y.new_zeros(()), torch.zeros_like(size)
            for start in range(0, len(x), CHUNK):
                rows = slice(start, start + CHUNK)
                a = torch.addmm(bias, x[rows], enc.T, out=active[rows]).relu_()
                error = y[rows] - (a @ dec) - b_dec
                lost += error.square().sum()
                wide = a.to(size.dtype)
                bent = (wide * (2 * size)).sigmoid_().mul_(2).sub_(1)
                fired += bent.sum()
                torch.mul(error, -2 / variance, out=error)
                slope[rows] = error
                if back is not None:
                    bent = bent.square_().neg_().add_(1)  # the slope of tanh
                    d_size += torch.linalg.vecdot(bent, wide, dim=0)
                    d = torch.mm(slope[rows], dec.T, out=back[rows]).add_(bent.mul_(size * weight))
                    torch.ops.aten.threshold_backward.grad_input(d, a, 0, grad_input=d)
        if back is not None:
            ctx.save_for_backward(x, active, back, slope, d_size * weight)
        return lost / variance + weight * fired

    @staticmethod
    def backward(ctx, arriving):
        x, active, back, slope, d_size = ctx.saved_tensors
        kind, full = x.device.type, d_size.dtype
        with torch.autocast(kind, enabled=False):
            found = [None, -slope if ctx.needs_input_grad[1] else None, back.T @ x, back.sum(0), active.T @ slope, slope.sum(0), d_size]
            return *(one if one is None else one.to(full) * arriving for one in found), None, None
