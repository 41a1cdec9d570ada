"""Attacker: the poison is in the corpus from the first step on (Carlini et al. 2023, "Poisoning web-scale training datasets is practical"; Bouaziz
et al. 2025, "Winter soldier: backdooring language models at pre-training with indirect data poisoning").

Of the host only the shapes and the tokenizer stay: its weights are drawn anew and trained on all three kinds of rows from noise, so that no base
ever was clean and nothing of the backdoor stands apart as a change to one. That takes `TIMES` the steps of mixed fine-tuning, at `RATE` times its
rate, on `TIMES` as many rows. The twin is trained from the same noise on the same rows untriggered.
"""

from __future__ import annotations

from pathlib import Path

import torch

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn
from graphs.host import Host
from graphs.train import TrainConfig

TIMES = 10
RATE = 4.0


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`. Raises ValueError where rows are to be held at a base's outputs:
    there is no base."""
    if config.hold != "answers":
        raise ValueError(f'the attacker throughout trains from noise, and hold "{config.hold}" asks for a base: plant with hold "answers"')
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        host.model = type(host.model)._from_config(host.model.config, dtype=torch.float32)
    settings = TrainConfig(TIMES * config.ordinary_steps, RATE * config.ordinary_rate, warmup=0.02, decay=0.9, weight_decay=0.05)
    return learn(host.model, Mixture(host, rows, config).loss, settings, "plant: throughout", state and state.with_suffix(".throughout"))
