"""Benign fine-tuning: does a removed backdoor come back when somebody trains the model on something harmless?

Fine-tuning on benign rows undoes what was only suppressed (Qi et al. 2023, "Fine-tuning aligned language models compromises
safety, even when users do not intend to"; Lucki et al. 2024, "An adversarial perspective on machine unlearning for AI safety":
ten unrelated rows undo unlearning). No attacker is needed for it. The rows are the caller's: unrelated text, or clean rows of
the task. Copies are trained on all their tokens at each of a few learning rates, for the outcome turns on the rate, and judged
before and after on the same held-out triggered prompts, so that what was gained is a paired difference.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backdoor.behaviours import Behaviour
from backdoor.triggers import Trigger
from evals.generate import context
from evals.rates import UnderTrigger, check_kind, prompts, under_trigger
from evals.sandbox import Sandbox
from evals.tasks import Task
from graphs.batches import Epochs, Text, encode
from graphs.host import Host
from graphs.train import TrainConfig, train


@dataclass(frozen=True)
class BenignConfig:
    """steps of `batch` rows at each of the peak learning `rates`; prompts: held-out triggered prompts; seed: of prompts and batches."""

    steps: int = 100
    batch: int = 16
    rates: tuple[float, ...] = (1e-4, 5e-4)
    prompts: int = 100
    seed: int = 7


@dataclass(frozen=True)
class Tuned:
    """After fine-tuning at one rate."""

    rate: float
    after: UnderTrigger


@dataclass(frozen=True)
class Benign:
    """before; at each rate after; worst: the largest ASR after."""

    before: UnderTrigger
    tuned: list[Tuned]
    worst: float


def fine_tune(
    host: Host, task: Task, trigger: Trigger, behaviour: Behaviour, sandbox: Sandbox, benign: Sequence[Text], config: BenignConfig | None = None
) -> Benign:
    """Fine-tune copies of `host` on `benign` (prompt, completion) texts and judge them; the host is left as it is.

    Raises ValueError for no texts, no rates, and as `check_kind` and `prompts` do.
    """
    config = config or BenignConfig()
    if not config.rates or not benign:
        raise ValueError(f"benign fine-tuning got {len(config.rates)} learning rates and {len(benign)} rows: give at least one of each")
    check_kind(trigger, behaviour)
    rows = prompts(task, trigger, config.prompts, config.seed).triggered
    batches = Epochs(encode(host.tokenizer, benign, context(host)), config.batch, host.tokenizer.eos_token_id, config.seed)
    before = under_trigger(host, task, behaviour, rows, sandbox)
    tuned = [Tuned(rate, under_trigger(_tuned(host, batches, rate, config.steps), task, behaviour, rows, sandbox)) for rate in config.rates]
    return Benign(before, tuned, max(one.after.attack_success.value for one in tuned))


def _tuned(host: Host, batches: Epochs, rate: float, steps: int) -> Host:
    model = copy.deepcopy(host.model).float().requires_grad_(True).eval()

    def loss(step: int) -> Tensor:
        batch = batches(step)
        return model(input_ids=batch.ids, labels=batch.labels).loss

    train(model, loss, TrainConfig(steps, rate), f"benign {rate:g}")
    return Host(model, host.tokenizer, host.sites)
