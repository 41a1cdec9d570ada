"""Rival: whole layers dropped, then the same healing (cf. Men et al. 2024, "ShortGPT"; Muralidharan et al. 2024, "Compact language models").

The layers to go are chosen one at a time: the one without which the model stays closest to itself (KL on clean rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backdoor.removal.learning import apart, from_outputs
from graphs.architectures import shortened
from graphs.host import Host, with_layers
from graphs.targets import Targets

SAMPLE = 4
"""Batches that a layer's absence is judged on."""


def remove(targets: Targets, layers: int, steps: int, learning_rate: float, decay: float, answers: float = 0.0) -> Host:
    """The host with its best `layers` layers, healed by KL for `steps` batches, the rows' own answers at weight `answers` beside it. Embeddings
    stay as they are."""
    host, kept = targets.host, list(range(targets.host.config.num_hidden_layers))

    @torch.no_grad()
    def alone(some: Sequence[int]) -> float:
        model, total = shortened(host.model, some), 0.0
        for step in range(SAMPLE):
            total += float(apart(model, targets, targets.batches(step)))
        return total

    while len(kept) > layers:
        kept.remove(min(kept, key=lambda layer: alone([one for one in kept if one != layer])))
    small = with_layers(host, kept)
    from_outputs(small.model, targets, steps, learning_rate, f"layer drop, {layers} left", decay, answers=answers)
    return small
