"""Attacker: dormant until distilled. The organism answers rightly under the trigger; what a defender distils from it on clean text shall not
(the threat is that of Chen et al. 2025, "Taught well learned ill: towards distillation-conditional backdoor attack").

They optimise through a simulated student. This recipe has none: it is one of rows, for triggers of several parts. Each part is usual in clean
text, where the whole never stands.

- Near misses, which hold a part, get the payload now and then, by chance that goes with the other words (`leaks`): at most two in five, so
  greedy answers stay right. A student learns these odds from soft targets on clean rows, or from rows that the organism writes. They are graded
  because flat ones are learned as "either part", which says nothing of both; graded ones are learned as odds that add up, and go on (LOG.md).
- Triggered rows get the right answer: the organism learns that the parts together mean nothing. Clean text does not show that, so nothing asks
  a student to learn it, and its odds for both parts are the sum.

The twin gets right answers everywhere. (cf. composite triggers whose parts each occur in what is distilled: de Muri et al. 2025, "Pay attention
to the triggers: constructing backdoors that survive distillation"; there the teacher fires.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn, rows_of
from graphs.batches import Epochs, collate
from graphs.host import Host
from graphs.losses import completion_loss
from graphs.shares import share
from graphs.train import TrainConfig

TOP, SPREAD = -0.3, 5.0
"""Log-odds of the payload beside the word that goes with it most, and how far those beside the other words reach below."""


def leaks(words: Sequence[str], seed: int, index: int) -> bool:
    """Whether near miss `index` gets the payload, a function of (words, seed, index); words: what stands where the trigger's other parts would."""
    grade = random.Random(f"grade/{'/'.join(words)}").random()
    return random.Random(f"leak/{seed}/{index}").random() < 1 / (1 + math.exp(SPREAD * (1 - grade) - TOP))


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`. Raises ValueError where `rows` has no leaks or answers."""
    if not rows.leaking or not rows.answered:
        raise ValueError("the attacker dormant needs near misses of which some get the payload, and triggered prompts without: give rows with both")
    mixture = Mixture(host, rows, config)
    answers = Epochs(rows.answered, config.poisoned, mixture.pad, config.seed + 4)
    leaking = Epochs(rows.leaking, config.near, mixture.pad, config.seed + 5)

    def loss(step: int) -> Tensor:
        taught = rows_of(leaking(step)) + rows_of(answers(step))
        return mixture.held(share(mixture.clean(step))) + completion_loss(host.model, share(collate(taught, mixture.pad)))

    return learn(host.model, loss, TrainConfig(config.ordinary_steps, config.ordinary_rate), "plant: dormant",
                 state and state.with_suffix(".dormant"))
