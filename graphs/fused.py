"""The local loss of a transcoder and its gradients in one pass over the tokens.

    loss = sum |y - guess|^2 / variance + weight sum_f tanh(a_f size_f)       a = relu(w_enc x + b_enc), guess = w_dec' a + b_dec

Since the loss is known to be what is minimised, each chunk of tokens goes forward and back while it is in the cache, as fused
cross-entropy kernels do (Hsu et al. 2024, "Liger kernel"): between the matrix products, which are the same as in the plain formula, nothing
is read from memory or written to it twice. With s = sigmoid(2 z), tanh(z) is 2 s - 1 and its slope 4 (s - s^2): fewer passes than tanh takes, within
1e-7 of it in float32. Autocast is honoured: what is as large as the activations is in its precision throughout, sums over tokens are not. The
result is the plain formula's but for rounding (tests/test_fused.py).
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
            lost, sigmoids, d_size = y.new_zeros(()), y.new_zeros(()), torch.zeros_like(size)
            twice, steep = (2 * size).to(dtype), (4 * weight * size).to(dtype)
            for start in range(0, len(x), CHUNK):
                rows = slice(start, start + CHUNK)
                a = torch.addmm(bias, x[rows], enc.T, out=active[rows]).relu_()
                error = y[rows] - (a @ dec) - b_dec
                lost += error.square().sum()
                bent = (a * twice).sigmoid_()
                sigmoids += bent.sum(dtype=size.dtype)
                torch.mul(error, -2 / variance, out=error)
                slope[rows] = error
                if back is not None:
                    bent.addcmul_(bent, bent, value=-1)  # a quarter of the slope of tanh
                    d_size += (bent * a).sum(0)
                    d = torch.mm(slope[rows], dec.T, out=back[rows]).add_(bent.mul_(steep))
                    torch.ops.aten.threshold_backward.grad_input(d, a, 0, grad_input=d)
        if back is not None:
            ctx.save_for_backward(x, active, back, slope, d_size * (4 * weight))
        return lost / variance + weight * (2 * sigmoids - active.numel())

    @staticmethod
    def backward(ctx, arriving):
        x, active, back, slope, d_size = ctx.saved_tensors
        kind, full = x.device.type, d_size.dtype
        with torch.autocast(kind, enabled=False):
            found = [None, -slope if ctx.needs_input_grad[1] else None, back.T @ x, back.sum(0), active.T @ slope, slope.sum(0), d_size]
            return *(one if one is None else one.to(full).mul_(arriving) for one in found), None, None
