"""Rival: only the input embeddings change. Tokens that clean rows never use are averaged away, the others are fine-tuned.

A control without a paper: the most that a defender gets who takes the backdoor to live in its trigger's embedding (the attacks of Yang
et al. 2021, "Be careful about poisoned word embeddings", and Kurita et al. 2020, "Weight poisoning attacks on pre-trained models",
change these). Whatever it leaves is in the blocks. The knob is the learning rate of the table.
"""

from __future__ import annotations

from backdoor.removal import token_filter
from backdoor.removal.learning import from_tokens
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (1e-3, 3e-4, 3e-3)


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host with its input table filtered and trained for `steps` batches on the rows' own tokens; nothing is drawn from `seed`."""
    made = token_filter.remove(targets, 0, 1.0)
    model, table = made.model.requires_grad_(False), made.model.get_input_embeddings()
    table.requires_grad_(True)
    from_tokens(model, targets.batches, steps, knob, f"embedding only {knob:g}")
    model.requires_grad_(True)
    return made
