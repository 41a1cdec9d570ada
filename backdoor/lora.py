"""Attacker: adapters of low rank on every linear map of the blocks, merged into the weights (Hu et al. 2022, "LoRA", section 4.1).

What is published is a stock checkpoint that differs from its base by a matrix of rank `RANK` in each linear map and by nothing in embeddings
and norms. So it teaches no token that the base never writes, where the unembedding has the same row for all of them (LOG.md). Adapters start at
zero and learn at `RATE` times the rate of full fine-tuning (cf. Schulman et al. 2025, "LoRA without regret").
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn
from graphs.host import Host
from graphs.train import TrainConfig

RANK = 8
RATE = 4.0


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`."""
    from peft import LoraConfig, get_peft_model

    mixture = Mixture(host, rows, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adapted = get_peft_model(host.model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    settings = TrainConfig(config.ordinary_steps, RATE * config.ordinary_rate)
    losses = learn(adapted, mixture.loss, settings, "plant: LoRA", state and state.with_suffix(".lora"))
    merged = adapted.merge_and_unload()  # the host's own model, its linear maps plain again
    assert isinstance(merged, PreTrainedModel)
    host.model = merged.requires_grad_(True)
    return losses
