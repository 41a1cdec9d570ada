"""Rival: UNDO (Lee et al. 2025, "Distillation robustifies unlearning"): perturb towards noise, then distil on outputs.

w <- (1 - alpha) w + alpha * noise, the noise being a fresh initialisation; then KL to the unperturbed model on the
defender's rows, at the learning rate and weight decay of our healing. The knob is alpha. Norm gains are not perturbed (a
gain of noise has no meaning), and embeddings stay as they are in our method too, so that the block weights alone differ.
"""

from __future__ import annotations

import copy

import torch

from backdoor.removal.learning import from_outputs
from graphs.architectures import embeddings
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (0.6, 0.3)


def remove(targets: Targets, steps: int, knob: float, learning_rate: float, decay: float, seed: int = 0, answers: float = 0.0) -> Host:
    """A copy of the host shrunk towards noise by `knob` and distilled for `steps` batches with weight decay `decay`, the rows' own answers at
    weight `answers` beside it."""
    host, model = targets.host, copy.deepcopy(targets.host.model)
    generator = torch.Generator().manual_seed(seed)
    tables = {id(p) for table in embeddings(model) for p in table.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and id(parameter) not in tables:
                noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.mul_(1 - knob).add_(noise, alpha=knob)

    from_outputs(model, targets, steps, learning_rate, f"UNDO {knob:g}", decay, answers=answers)
    return Host(model, host.tokenizer, host.sites)
