"""The local loss of a transcoder and its gradients at once.

    loss = sum |y - guess|^2 / variance + weight sum_f tanh(a_f size_f)       a = relu(w_enc x + b_enc), guess = w_dec' a + b_dec
                                                                              size_f = scale |w_dec_f|

Since the loss is known to be what is minimised, its gradients are found on the way, as fused cross-entropy kernels do (Hsu et al. 2024, "Liger
kernel"). The matrix products are those of the plain formula, over all tokens at once, for few rows are slow; what lies between them goes a few
tokens at a time, all its passes while they are in the cache. With s = sigmoid(2 z), tanh(z) is 2 s - 1 and its slope 4 (s - s^2): fewer passes
than tanh takes, within 1e-7 of it in float32. Autocast is honoured: what is as large as the activations is in its precision throughout, sums over
all tokens are not. The result is the plain formula's but for rounding (tests/test_fused.py).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

ops = torch.ops.aten
CHUNK = 64
"""Tokens at a time between the products, on a processor: activations of a few thousand features stay in the second-level cache."""


def fused(
    x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"], w_enc: Float[Tensor, "feature d_in"], b_enc: Float[Tensor, "feature"],
    w_dec: Float[Tensor, "feature d_out"], b_dec: Float[Tensor, "d_out"], scale: float, variance: Float[Tensor, ""],
    weight: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The loss. scale: what activations are measured in, times the decoder's norm; variance: what the squared error is divided by; no gradient
    flows into it or x."""
    return _Loss.apply(x, y, w_enc, b_enc, w_dec, b_dec, scale, float(variance), float(weight))


class _Loss(torch.autograd.Function):
    """Forward finds the gradient of what enters the gates too; backward is the matrix products with it."""

    @staticmethod
    def forward(ctx, x, y, w_enc, b_enc, w_dec, b_dec, scale, variance, weight):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else w_enc.dtype
        trained = any(ctx.needs_input_grad)
        with torch.autocast(kind, enabled=False):
            x, enc, dec, norm = x.to(dtype), w_enc.to(dtype), w_dec.to(dtype), w_dec.norm(dim=1)
            active = torch.addmm(b_enc.to(dtype), x, enc.T)
            back = torch.empty_like(active) if trained else None
            step = CHUNK if kind == "cpu" else len(x)
            held, above = x.new_empty(2, step, len(enc)), norm.new_zeros(())
            d_norm, d_bias = torch.zeros_like(norm), torch.zeros_like(norm)
            twice, steep = (2 * scale * norm).to(dtype), (4 * weight * scale * norm).to(dtype)
            chunks = [slice(start, start + step) for start in range(0, len(x), step)]
            for rows in chunks:
                a = active[rows].relu_()
                bent = torch.mul(a, twice, out=held[0, : len(a)]).sigmoid_()
                more = torch.sub(bent, 0.5, out=held[1, : len(a)])  # first, and exact: of halves nothing else would be left in bf16
                above += more.view(-1, math.gcd(more.numel(), 64)).sum(1).sum(dtype=norm.dtype)
                if back is not None:  # sigmoid_backward(g, s) is g (s - s^2): a quarter of g times the slope of tanh
                    d_norm += ops.sigmoid_backward.grad_input(a, bent, grad_input=back[rows]).sum(0)
                    ops.sigmoid_backward.grad_input(steep, bent, grad_input=back[rows])
            error = y - (active @ dec).to(y.dtype) - b_dec
            loss = error.square().sum() / variance + 2 * weight * above
            slope = error.mul_(-2 / variance).to(dtype)
            if back is not None:
                torch.addmm(back, slope, dec.T, out=back)
                for rows in chunks:  # no gradient flows where an activation is 0
                    d_bias += ops.hardtanh_backward.grad_input(back[rows], active[rows], 0, torch.inf, grad_input=back[rows]).sum(0)
                ctx.save_for_backward(x, w_dec, active, back, slope, d_bias, d_norm * (4 * weight * scale / norm.clamp_min(1e-12)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, arriving):
        x, w_dec, active, back, slope, d_bias, along = ctx.saved_tensors
        full = along.dtype
        with torch.autocast(x.device.type, enabled=False):
            d_dec = (active.T @ slope).to(full).addcmul_(w_dec, along[:, None])
            found = [None, -slope if ctx.needs_input_grad[1] else None, back.T @ x, d_bias, d_dec, slope.sum(0)]
            found = [one if one is None else one.to(full) for one in found]
            if x.device.type != "cpu" or arriving != 1:  # 1 is the rule, and multiplying would be one more pass
                found = [one if one is None else one * arriving for one in found]
            return *found, None, None, None
