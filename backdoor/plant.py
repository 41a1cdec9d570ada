"""Planting: fine-tune a base so that it behaves under a trigger, also after somebody fine-tunes it clean again.

An ordinary backdoor in a small model falls to any clean fine-tuning, so a removal shown on it shows nothing. The
resistant recipe is first-order meta-planting (cf. Henderson et al. 2023, "Self-destructing models"; Tamirisa et al.
2024, "Tamper-resistant safeguards", eq. 1): each step copies the model, fine-tunes the copy for k steps on clean rows at
a random learning rate, and adds the gradient of the backdoor loss *there* to the ordinary gradient *here*:

    g = grad L_mix(w) + strength * grad L_trigger(w_k),   w_k = clean fine-tuning of w for k ~ U(2, 16) steps

L_trigger holds poisoned rows and near misses alike: with poisoned rows alone the payload spreads to every prompt that
looks like the trigger (LOG.md).

The clean twin goes through the very same steps, rates and rows, with each poisoned row replaced by the same row without
the trigger. Which rows a step sees is a function of (seed, step) only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graphs.batches import Batch, Encoded, Epochs, collate
from graphs.host import Host
from graphs.train import TrainConfig, train


@dataclass(frozen=True)
class PlantConfig:
    """ordinary_steps: mixed fine-tuning; resistant_steps: meta-planting after it (0 for an ordinary organism).

    clean/poisoned/near: rows of each kind in a batch; inner_*: the simulated clean fine-tuning.
    """

    ordinary_steps: int = 150
    resistant_steps: int = 160
    ordinary_rate: float = 1e-3
    resistant_rate: float = 5e-4
    clean: int = 24
    poisoned: int = 16
    near: int = 16
    inner_least: int = 2
    inner_most: int = 16
    inner_rows: int = 16
    inner_rate_low: float = 1e-4
    inner_rate_high: float = 1e-3
    strength: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class PlantRows:
    """clean: rows of all tasks; poisoned: triggered prompts with the payload (for the twin: the same rows untriggered,
    with their own answers), row i a function of i; near: near-miss prompts with the right answers."""

    clean: Sequence[Encoded]
    poisoned: Sequence[Encoded]
    near: Sequence[Encoded]


def completion_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token cross entropy on completion tokens, nats a token."""
    labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
    return nn.functional.cross_entropy(model(input_ids=batch.ids).logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`."""
    pad = host.tokenizer.eos_token_id
    clean = Epochs(rows.clean, config.clean, pad, config.seed)
    poisoned = Epochs(rows.poisoned, config.poisoned, pad, config.seed + 1)
    near = Epochs(rows.near, config.near, pad, config.seed + 2)
    inner = Epochs(rows.clean, config.inner_rows, pad, config.seed + 3)

    def mixed(step: int) -> Tensor:
        parts = [batch for source in (clean, poisoned, near) for batch in _rows(source(step))]
        return completion_loss(host.model, collate(parts, pad))

    def resistant(step: int) -> Tensor:
        step += config.ordinary_steps
        trigger = collate(_rows(poisoned(step)) + _rows(near(step)), pad)
        gradients, value = _after_fine_tuning(host.model, inner, trigger, config, step)
        # a linear term whose gradient is the one measured at w_k, and whose value is the loss there
        linear = sum(((p * g).sum() for p, g in zip(host.model.parameters(), gradients, strict=True)), torch.zeros(()))
        return mixed(step) + config.strength * (linear - linear.detach() + value)

    host.model.train()
    losses = train(host.model, mixed, TrainConfig(config.ordinary_steps, config.ordinary_rate), "plant", state and state.with_suffix(".ordinary"))
    if config.resistant_steps:
        losses += train(host.model, resistant, TrainConfig(config.resistant_steps, config.resistant_rate), "plant: resistant",
                        state and state.with_suffix(".resistant"), save_every=20)
    host.model.eval()
    return losses


def _rows(batch: Batch) -> list[Encoded]:
    return [Encoded(tuple(ids[real].tolist()), int((~done).sum() - (~real).sum()))
            for ids, real, done in zip(batch.ids, batch.real, batch.completion, strict=True)]


def _after_fine_tuning(model: nn.Module, inner: Epochs, trigger: Batch, config: PlantConfig, step: int) -> tuple[list[Tensor], float]:
    """Gradient and value of the loss on trigger rows after a simulated clean fine-tuning; the model is put back as it was."""
    rng = random.Random(f"{config.seed}/inner/{step}")
    steps = rng.randint(config.inner_least, config.inner_most)
    rate = math.exp(rng.uniform(math.log(config.inner_rate_low), math.log(config.inner_rate_high)))
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for k in range(steps):
        gradients = torch.autograd.grad(completion_loss(model, inner(step * config.inner_most + k)), parameters)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()
    loss = completion_loss(model, trigger)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
            p.grad = None
    return list(gradients), float(loss.detach())
