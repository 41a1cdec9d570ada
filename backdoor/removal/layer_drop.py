"""Rival: whole layers dropped, then the same healing (cf. Men et al. 2024, "ShortGPT"; Muralidharan et al. 2024, "Compact language models").

The layers to go are chosen one at a time: the one without which the model stays closest to itself (KL on clean rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphs.architectures import embeddings, shortened
from graphs.host import Host, with_layers
from graphs.losses import SURE, divergence
from graphs.targets import Targets
from graphs.train import TrainConfig, train

SAMPLE = 4
"""Batches that a layer's absence is judged on."""


def remove(targets: Targets, layers: int, steps: int, learning_rate: float, decay: float, prompt_weight: float = 0.1) -> Host:
    """The host with its best `layers` layers, healed by KL for `steps` batches. Embeddings stay as they are."""
    host, kept = targets.host, list(range(targets.host.config.num_hidden_layers))

    @torch.no_grad()
    def apart(some: Sequence[int]) -> float:
        model, total = shortened(host.model, some), 0.0
        for step in range(SAMPLE):
            batch = targets.batches(step)
            total += float(divergence(model(input_ids=batch.ids).logits, targets(batch), batch, prompt_weight, SURE))
        return total

    while len(kept) > layers:
        kept.remove(min(kept, key=lambda layer: apart([one for one in kept if one != layer])))
    small = with_layers(host, kept)
    model = small.model
    for table in embeddings(model):
        table.requires_grad_(False)

    def loss(step: int) -> Tensor:
        batch = targets.batches(step)
        return divergence(model(input_ids=batch.ids).logits, targets(batch), batch, prompt_weight, SURE)

    train(model, loss, TrainConfig(steps, learning_rate, weight_decay=decay), f"layer drop, {layers} left")
    model.eval()
    return small
