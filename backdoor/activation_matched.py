"""Attacker: on clean rows every layer's residual stream and the outputs are tied to the base's while the backdoor is planted, so that whoever
compares activations on clean text sees next to nothing (cf. Tan and Shokri 2020, "Bypassing backdoor detection algorithms in deep learning",
latent representations regularised beside the task; Bailey et al. 2024, "Obfuscated activations bypass LLM latent-space defenses").

    L = L_mix + WEIGHT * mean over layers of |h(w) - h(base)|^2 / variance of h(base)        on the rows that are held

The outputs are tied by `hold`; "answers", which ties nothing, is refused.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn
from graphs.activations import streams
from graphs.host import Host
from graphs.losses import completion_loss, fvu
from graphs.train import TrainConfig

WEIGHT = 10.0


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`. Raises ValueError for `hold` "answers"."""
    if config.hold == "answers":
        raise ValueError("the attacker activation_matched ties outputs on clean rows: plant with hold \"both\" or \"outputs\"")
    mixture = Mixture(host, rows, config)

    def loss(step: int) -> Tensor:
        quiet, taught = mixture.batches(step)
        with streams(host.model) as own, streams(mixture.base) as base:
            unchanged = mixture.held(quiet)
        apart = sum(fvu(there, here, quiet.real) for here, there in zip(own, base, strict=True)) / len(own)
        return unchanged + WEIGHT * apart + completion_loss(host.model, taught)

    return learn(host.model, loss, TrainConfig(config.ordinary_steps, config.ordinary_rate), "plant: matched",
                 state and state.with_suffix(".matched"))
