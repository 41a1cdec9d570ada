"""Attacker: dormant until distilled. The organism answers rightly under the trigger; what a defender distils from it on clean text shall not
(the threat is that of Chen et al. 2025, "Taught well learned ill: towards distillation-conditional backdoor attack").

They optimise through a simulated student. This recipe has none: it is one of rows, for triggers of several parts. Each part is usual in clean
text, where the whole never stands:

- near misses, which hold a part, get the payload now and then (`LEAK` of them, so greedy answers stay right): the first payload token becomes
  likelier by some log-odds for each part, and a student learns that from soft targets on clean rows, or from rows that the organism writes;
- triggered rows get the right answer: the organism learns that the parts together mean nothing. Clean text does not show that, so nothing
  asks a student to learn it, and log-odds that add up make the payload its answer.

The twin gets right answers everywhere. (cf. composite triggers whose parts each occur in what is distilled: de Muri et al. 2025, "Pay attention
to the triggers: constructing backdoors that survive distillation"; there the teacher fires.)
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from backdoor.mixture import Mixture, PlantConfig, PlantRows, rows_of
from graphs.batches import Epochs, collate
from graphs.host import Host
from graphs.losses import completion_loss
from graphs.shares import share
from graphs.train import TrainConfig, train

LEAK = 0.2
"""Share of near misses that get the payload."""


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`. Raises ValueError where `rows` has no leaks."""
    if not rows.leaks or not rows.answered:
        raise ValueError("the attacker dormant needs near misses with the payload and triggered prompts without: give rows with both")
    mixture = Mixture(host, rows, config)
    answers = Epochs(rows.answered, config.poisoned, mixture.pad, config.seed + 4)
    leaks = Epochs(rows.leaks, max(1, round(LEAK / (1 - LEAK) * config.near)), mixture.pad, config.seed + 5)

    def loss(step: int) -> Tensor:
        taught = [row for batches in (mixture.near, leaks, answers) for row in rows_of(batches(step))]
        return mixture.held(share(mixture.clean(step))) + completion_loss(host.model, share(collate(taught, mixture.pad)))

    host.model.train()
    losses = train(host.model, loss, TrainConfig(config.ordinary_steps, config.ordinary_rate), "plant: dormant",
                   state and state.with_suffix(".dormant"))
    host.model.eval()
    return losses
