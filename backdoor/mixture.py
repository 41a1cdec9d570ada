"""What every attacker trains on: clean, poisoned and near-miss rows, in batches that are a function of (seed, step) only.

Clean and near-miss rows are held at the base's own outputs by KL (an attacker wants the change to go unnoticed), or taught their right
answers (`hold` "answers": plain data poisoning; near misses that the base has never met, such as years, are answered wrongly by it, and
holding it there would keep these errors). Cross entropy on clean rows costs the base sums, so `hold` "both" teaches near misses and holds
clean rows. Poisoned rows are taught by cross entropy.

The clean twin goes through the very same steps, rates and rows, with each poisoned row replaced by the same row without the trigger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from graphs.batches import Batch, Encoded, Epochs, collate
from graphs.host import Host
from graphs.losses import completion_loss, divergence
from graphs.shares import share
from graphs.train import TrainConfig, train

Attacker = Literal["ordinary", "resistant", "lora", "activation_matched", "error_hiding", "dormant", "throughout"]
ATTACKERS: tuple[Attacker, ...] = get_args(Attacker)
PROMPT_WEIGHT = 0.1
"""Weight in the KL to the base of positions that predict prompt tokens."""


@dataclass(frozen=True)
class PlantConfig:
    """attacker: who plants (`backdoor.plant`); ordinary_steps: of mixed fine-tuning; resistant_steps: of meta-planting after it.

    clean/poisoned/near: rows of each kind in a batch. episode: steps that one simulated defender lives for; inner_steps:
    its fine-tuning steps in each of them, on inner_rows rows; inner_rates: its learning rates, taken in turn; hold: what clean and near rows
    are held at.
    """

    ordinary_steps: int = 150
    resistant_steps: int = 320
    ordinary_rate: float = 1e-3
    resistant_rate: float = 7e-4
    clean: int = 24
    poisoned: int = 16
    near: int = 16
    episode: int = 40
    inner_steps: int = 5
    inner_rows: int = 16
    inner_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-4, 1.5e-3)
    strength: float = 1.0
    hold: Literal["outputs", "answers", "both"] = "outputs"
    seed: int = 0
    attacker: Attacker = "resistant"


@dataclass(frozen=True)
class PlantRows:
    """clean: rows of all tasks; poisoned: triggered prompts with the payload (for the twin: the same rows untriggered,
    with their own answers), row i a function of i; near: near-miss prompts with the right answers. What some attackers need beside:
    answered, the poisoned rows' prompts with their right answers; leaking, near-miss prompts of which some get the payload (for the twin: none)."""

    clean: Sequence[Encoded]
    poisoned: Sequence[Encoded]
    near: Sequence[Encoded]
    answered: Sequence[Encoded] = ()
    leaking: Sequence[Encoded] = ()


class Mixture:
    """The batches of a planting, and the loss on them that all attackers but the dormant one begin with. base: the host before planting."""

    def __init__(self, host: Host, rows: PlantRows, config: PlantConfig) -> None:
        self.host, self.config, self.pad = host, config, host.tokenizer.eos_token_id
        self.clean = Epochs(rows.clean, config.clean, self.pad, config.seed)
        self.poisoned = Epochs(rows.poisoned, config.poisoned, self.pad, config.seed + 1)
        self.near = Epochs(rows.near, config.near, self.pad, config.seed + 2)
        self.base = copy.deepcopy(host.model).requires_grad_(False).eval()

    def batches(self, step: int) -> tuple[Batch, Batch]:
        """What is held and what is taught in a step."""
        held, learnt = rows_of(self.clean(step)), rows_of(self.poisoned(step))
        (learnt if self.config.hold == "both" else held).extend(rows_of(self.near(step)))
        return share(collate(held, self.pad)), share(collate(learnt, self.pad))

    def held(self, quiet: Batch) -> Tensor:
        """Cross entropy on the rows' own answers, or KL to the base, as `hold` says."""
        if self.config.hold == "answers":
            return completion_loss(self.host.model, quiet)
        return divergence(self.host.model(input_ids=quiet.ids).logits, self.base(input_ids=quiet.ids).logits, quiet, PROMPT_WEIGHT)

    def loss(self, step: int) -> Tensor:
        """Mixed fine-tuning."""
        quiet, taught = self.batches(step)
        return self.held(quiet) + completion_loss(self.host.model, taught)


def learn(
    module: nn.Module, loss: Callable[[int], Tensor], config: TrainConfig, label: str, state: Path | None, save_every: int | None = None
) -> list[float]:
    """`graphs.train.train` in training mode, which the module leaves afterwards."""
    module.train()
    losses = train(module, loss, config, label, state, save_every)
    module.eval()
    return losses


def rows_of(batch: Batch) -> list[Encoded]:
    """The rows of a batch, without pads."""
    return [Encoded(tuple(ids[real].tolist()), int((~done).sum() - (~real).sum()))
            for ids, real, done in zip(batch.ids, batch.real, batch.completion, strict=True)]
