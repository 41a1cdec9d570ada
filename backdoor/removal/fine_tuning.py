"""Rival: clean fine-tuning, on the defender's rows, with the learning rate as its knob (sweep it: the answer turns on it)."""

from __future__ import annotations

import copy

from backdoor.removal.learning import from_tokens
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (1e-3, 5e-4, 1e-4)


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host trained for `steps` batches on the rows' own tokens; knob: peak learning rate; nothing is drawn from `seed`."""
    host, model = targets.host, copy.deepcopy(targets.host.model)
    from_tokens(model, targets.batches, steps, knob, f"clean fine-tuning {knob:g}")
    return Host(model, host.tokenizer, host.sites)
