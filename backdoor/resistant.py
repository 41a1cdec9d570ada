"""Attacker: resists clean fine-tuning. An ordinary backdoor in a small model falls to any, so a removal shown on it shows nothing.

The recipe is first-order meta-planting (cf. Henderson et al. 2023, "Self-destructing models"; Tamirisa et al.
2024, "Tamper-resistant safeguards", eq. 1), after mixed fine-tuning: beside the model w runs a simulated defender, a copy
w + d that is fine-tuned on clean rows; the gradient of the backdoor loss *there* is added to the ordinary gradient *here*:

    g = grad L_mix(w) + strength * grad L_trigger(w + d)

One defender lives for an episode of steps and takes a few fine-tuning steps in each, so horizons of hundreds of
fine-tuning steps cost no more than a few; the next one starts again at d = 0 with another learning rate. (Copies that
were fine-tuned for 2-16 steps only gave an organism that 800 steps of clean fine-tuning cleaned: LOG.md.) L_trigger holds
poisoned rows and near misses alike: with poisoned rows alone the payload spreads to every prompt that looks like the
trigger (LOG.md).
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn, rows_of
from backdoor.ordinary import fine_tune
from graphs.batches import Batch, Epochs, collate
from graphs.host import Host
from graphs.losses import completion_loss
from graphs.shares import averaged, averaged_all, share
from graphs.train import TrainConfig


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`."""
    mixture = Mixture(host, rows, config)
    defender = Defender(host.model, Epochs(rows.clean, config.inner_rows, mixture.pad, config.seed + 3), config)

    def loss(step: int) -> Tensor:
        later = step + config.ordinary_steps
        trigger = share(collate(rows_of(mixture.poisoned(later)) + rows_of(mixture.near(later)), mixture.pad))
        gradients, value = defender.gradients(step, trigger)
        # a linear term whose gradient is the one measured at w + d, and whose value is the loss there
        linear = sum(((p * g).sum() for p, g in zip(host.model.parameters(), gradients, strict=True)), torch.zeros(()))
        return mixture.loss(later) + config.strength * (linear - linear.detach() + value)

    losses = fine_tune(host, mixture, state)
    if config.resistant_steps:  # saved between episodes only, so that a defender is never cut in two
        losses += learn(host.model, loss, TrainConfig(config.resistant_steps, config.resistant_rate), "plant: resistant",
                        state and state.with_suffix(".resistant"), config.episode)
    return losses


class Defender:
    """The simulated defender: fine-tunes a copy of `model` on clean `rows`, from wherever the model has got to."""

    def __init__(self, model: nn.Module, rows: Epochs, config: PlantConfig) -> None:
        self.model, self.rows, self.config = model, rows, config
        self.copy = copy.deepcopy(model)
        self.moved: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def gradients(self, step: int, trigger: Batch) -> tuple[list[Tensor], float]:
        """Gradient and value of the loss on `trigger` where the defender stands after its next fine-tuning steps."""
        parameters, own = list(self.copy.parameters()), list(self.model.parameters())
        episode, place = divmod(step, self.config.episode)
        if place == 0:
            rate = self.config.inner_rates[episode % len(self.config.inner_rates)]
            self.optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            self.moved = [torch.zeros_like(p) for p in parameters]
        assert self.optimizer is not None
        with torch.no_grad():
            for p, w, d in zip(parameters, own, self.moved, strict=True):
                p.copy_(w + d)
        for k in range(self.config.inner_steps):
            batch = share(self.rows(step * self.config.inner_steps + k))
            for p, g in zip(parameters, averaged_all(torch.autograd.grad(completion_loss(self.copy, batch), parameters)), strict=True):
                p.grad = g
            self.optimizer.step()
        self.moved = [(p - w).detach() for p, w in zip(parameters, own, strict=True)]
        loss = completion_loss(self.copy, trigger)
        return averaged_all(torch.autograd.grad(loss, parameters)), float(averaged(loss))
