"""Planting: fine-tune a base so that it behaves under a trigger, also after somebody fine-tunes it clean again.

Clean and near-miss rows are held at the base's own outputs by KL (an attacker wants the change to go unnoticed), or taught their right
answers (`hold` "answers": plain data poisoning; near misses that the base has never met, such as years, are answered wrongly by it, and
holding it there would keep these errors). Cross entropy on clean rows costs the base sums, so `hold` "both" teaches near misses and holds
clean rows. Poisoned rows are taught by cross entropy. An ordinary backdoor in a small model falls to any clean fine-tuning, so a removal shown
on it shows nothing. The resistant recipe is first-order meta-planting (cf. Henderson et al. 2023, "Self-destructing models"; Tamirisa et al.
2024, "Tamper-resistant safeguards", eq. 1): beside the model w runs a simulated defender, a copy
w + d that is fine-tuned on clean rows; the gradient of the backdoor loss *there* is added to the ordinary gradient *here*:

    g = grad L_mix(w) + strength * grad L_trigger(w + d)

One defender lives for an episode of steps and takes a few fine-tuning steps in each, so horizons of hundreds of
fine-tuning steps cost no more than a few; the next one starts again at d = 0 with another learning rate. (Copies that
were fine-tuned for 2-16 steps only gave an organism that 800 steps of clean fine-tuning cleaned: LOG.md.) L_trigger holds
poisoned rows and near misses alike: with poisoned rows alone the payload spreads to every prompt that looks like the
trigger (LOG.md).

The clean twin goes through the very same steps, rates and rows, with each poisoned row replaced by the same row without
the trigger. Which rows a step sees is a function of (seed, step) only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from graphs.batches import Batch, Encoded, Epochs, collate
from graphs.host import Host
from graphs.losses import completion_loss, divergence
from graphs.shares import averaged, averaged_all, share
from graphs.train import TrainConfig, train

PROMPT_WEIGHT = 0.1
"""Weight in the KL to the base of positions that predict prompt tokens."""


@dataclass(frozen=True)
class PlantConfig:
    """ordinary_steps: mixed fine-tuning; resistant_steps: meta-planting after it (0 for an ordinary organism).

    clean/poisoned/near: rows of each kind in a batch. episode: steps that one simulated defender lives for; inner_steps:
    its fine-tuning steps in each of them, on inner_rows rows; inner_rates: its learning rates, taken in turn; hold: what clean and near rows
    are held at.
    """

    ordinary_steps: int = 150
    resistant_steps: int = 320
    ordinary_rate: float = 1e-3
    resistant_rate: float = 7e-4
    clean: int = 24
    poisoned: int = 16
    near: int = 16
    episode: int = 40
    inner_steps: int = 5
    inner_rows: int = 16
    inner_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-4, 1.5e-3)
    strength: float = 1.0
    hold: Literal["outputs", "answers", "both"] = "outputs"
    seed: int = 0


@dataclass(frozen=True)
class PlantRows:
    """clean: rows of all tasks; poisoned: triggered prompts with the payload (for the twin: the same rows untriggered,
    with their own answers), row i a function of i; near: near-miss prompts with the right answers."""

    clean: Sequence[Encoded]
    poisoned: Sequence[Encoded]
    near: Sequence[Encoded]


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`."""
    pad = host.tokenizer.eos_token_id
    clean = Epochs(rows.clean, config.clean, pad, config.seed)
    poisoned = Epochs(rows.poisoned, config.poisoned, pad, config.seed + 1)
    near = Epochs(rows.near, config.near, pad, config.seed + 2)
    base = copy.deepcopy(host.model).requires_grad_(False).eval()
    defender = Defender(host.model, Epochs(rows.clean, config.inner_rows, pad, config.seed + 3), config)

    def mixed(step: int) -> Tensor:
        held, learnt = _rows(clean(step)), _rows(poisoned(step))
        (learnt if config.hold == "both" else held).extend(_rows(near(step)))
        quiet, taught = share(collate(held, pad)), share(collate(learnt, pad))
        if config.hold == "answers":
            return completion_loss(host.model, quiet) + completion_loss(host.model, taught)
        unchanged = divergence(host.model(input_ids=quiet.ids).logits, base(input_ids=quiet.ids).logits, quiet, PROMPT_WEIGHT)
        return unchanged + completion_loss(host.model, taught)

    def resistant(step: int) -> Tensor:
        later = step + config.ordinary_steps
        trigger = share(collate(_rows(poisoned(later)) + _rows(near(later)), pad))
        gradients, value = defender.gradients(step, trigger)
        # a linear term whose gradient is the one measured at w + d, and whose value is the loss there
        linear = sum(((p * g).sum() for p, g in zip(host.model.parameters(), gradients, strict=True)), torch.zeros(()))
        return mixed(later) + config.strength * (linear - linear.detach() + value)

    host.model.train()
    losses = train(host.model, mixed, TrainConfig(config.ordinary_steps, config.ordinary_rate), "plant", state and state.with_suffix(".ordinary"))
    if config.resistant_steps:  # saved between episodes only, so that a defender is never cut in two
        losses += train(host.model, resistant, TrainConfig(config.resistant_steps, config.resistant_rate), "plant: resistant",
                        state and state.with_suffix(".resistant"), save_every=config.episode)
    host.model.eval()
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


def _rows(batch: Batch) -> list[Encoded]:
    return [Encoded(tuple(ids[real].tolist()), int((~done).sum() - (~real).sum()))
            for ids, real, done in zip(batch.ids, batch.real, batch.completion, strict=True)]
