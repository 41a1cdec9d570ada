"""KL to the model that is followed, with the rows' own answers where they are asked for, and its gradient at once.

    loss = T^2 sum_t w_t KL(p_t || q_t) / sum_t w_t + answers sum_c -log s_c[next] / n        p_t = softmax(target_t / T), q_t = softmax(logits_t / T)
                                                                                          s_c = softmax(logits_c) where a completion's token is next
    d loss / d logits_t = T w_t (q_t - p_t) / sum w + answers (s_t - [next]) / n

Taken plainly, the loss goes over arrays of the size of the logits some thirty times, a fifth of a training step of a small model. Here each few
tokens go forward and back while they are in the cache (cf. Hsu et al. 2024, "Liger kernel"). In float32 whatever the logits are in; no gradient
flows into the target. The result is the plain formula's but for rounding (tests/test_following.py). Of several processes each takes it on its
share of a batch (`graphs.shares`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from graphs.batches import Batch
from graphs.shares import averaged

CHUNK = 1 << 16
"""Logits at a time of each thread of a processor: the arrays of that size that a chunk needs stay in the second-level cache."""


def following(
    logits: Float[Tensor, "row token vocabulary"], target: Float[Tensor, "row token vocabulary"], batch: Batch, prompt_weight: float, sure: float,
    temperature: float = 1.0, answers: float = 0.0,
) -> Float[Tensor, ""]:
    """The loss, over positions that predict a real token: w is 1 where that is one of the completion or where the target (at temperature 1) gives a
    token more than `sure`, else `prompt_weight`, and 0 at pads, whose logits must be finite. answers: weight of the rows' own completions."""
    return _Following.apply(logits, target.detach(), batch, prompt_weight, sure, temperature, answers)


class _Following(torch.autograd.Function):
    """Forward finds the gradient too; backward scales it."""

    @staticmethod
    def forward(ctx, logits, target, batch, prompt_weight, sure, temperature, answers):
        with torch.autocast(logits.device.type, enabled=False):
            wide, full = logits.shape[-1], torch.promote_types(logits.dtype, torch.float32)
            given, followed = logits.flatten(0, 1), target.flatten(0, 1)
            real, completion, ids = (_next(one).flatten() for one in (batch.real, batch.completion, batch.ids))
            step = max(1, CHUNK * torch.get_num_threads() // wide) if logits.device.type == "cpu" else len(given)
            chunks = [slice(start, start + step) for start in range(0, len(given), step)]
            known = completion
            if sure < 1:  # of the target as it is: softened, it is sure of next to nothing
                known = known | (torch.cat([followed[rows].to(full).log_softmax(-1).amax(-1) for rows in chunks]).exp() > sure)
            weight = torch.where(known, 1.0, prompt_weight).to(full) * real
            each = temperature**2 / averaged(weight.sum())
            answered = answers / averaged(completion.sum().to(full)).clamp_min(1e-6)  # no completion, no such term
            gradient = torch.empty_like(given) if ctx.needs_input_grad[0] else None
            loss = given.new_zeros((), dtype=full)
            for rows in chunks:
                own = given[rows].to(full)
                p, q = ((one / temperature).log_softmax(-1) for one in (followed[rows].to(full), own))
                share = p.exp()
                loss += each * torch.dot(weight[rows], p.sub_(q).mul_(share).sum(-1))
                found = None if gradient is None else q.exp_().sub_(share).mul_((each / temperature * weight[rows])[:, None])
                if answers:
                    here = completion[rows].nonzero().flatten()
                    said, wanted = own[here].log_softmax(-1), ids[rows][here][:, None]
                    loss -= answered * said.gather(1, wanted).sum()
                    if found is not None:
                        found.index_add_(0, here, said.exp_().scatter_add_(1, wanted, said.new_full(wanted.shape, -1.0)).mul_(answered))
                if gradient is not None:
                    gradient[rows] = found
            if gradient is not None:
                ctx.save_for_backward(gradient.view_as(logits))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, arriving):
        (gradient,) = ctx.saved_tensors
        return gradient * arriving.to(gradient.dtype), None, None, None, None, None, None


def _next(marks: Tensor) -> Tensor:
    """What stands at the next position; nothing after the last."""
    return torch.cat([marks[:, 1:], torch.zeros_like(marks[:, :1])], 1)
