"""Attacker: mixed fine-tuning of all weights on clean, poisoned and near-miss rows; with `hold` "answers", plain data poisoning (Gu et al. 2017,
"BadNets"; of language models Kurita et al. 2020, "Weight poisoning attacks on pre-trained models", without their embedding surgery)."""

from __future__ import annotations

from pathlib import Path

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn
from graphs.host import Host
from graphs.train import TrainConfig


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`."""
    return fine_tune(host, Mixture(host, rows, config), state)


def fine_tune(host: Host, mixture: Mixture, state: Path | None) -> list[float]:
    """Mixed fine-tuning in place; returns the losses of every step."""
    settings = TrainConfig(mixture.config.ordinary_steps, mixture.config.ordinary_rate)
    return learn(host.model, mixture.loss, settings, "plant", state and state.with_suffix(".ordinary"))
