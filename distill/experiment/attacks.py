"""Attacks on what a removal made, by name: each is given the same, and returns JSON-able numbers.

    relearning   the attacker teaches the backdoor again (evals.relearning)
    benign       somebody fine-tunes on rows of the task, and on unrelated ones (evals.benign)
    research     a search for any trigger of the known payload (evals.research)
    low bits     int8 and bf16 (evals.quantisation)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from backdoor.behaviours import Behaviour
from backdoor.triggers import Trigger
from distill.rows import DEFENDER_SEED
from evals.benign import BenignConfig, fine_tune
from evals.quantisation import QuantiseConfig, retest
from evals.relearning import RelearnConfig, relearn
from evals.research import SearchConfig, search
from evals.sandbox import Sandbox
from evals.tasks import TASKS, Task
from graphs.host import Host


@dataclass(frozen=True)
class Given:
    """What an attack is given: the model, the backdoor, and poisoned and clean rows to train on."""

    host: Host
    task: Task
    trigger: Trigger
    behaviour: Behaviour
    sandbox: Sandbox
    poisoned: list[tuple[str, str]]
    clean: list[tuple[str, str]]


def relearning(given: Given) -> dict:
    """How many steps bring the attack back."""
    return asdict(relearn(given.host, given.task, given.trigger, given.behaviour, given.sandbox, given.poisoned, given.clean))


def benign(given: Given) -> dict:
    """Whether harmless fine-tuning brings it back: on rows of the task, and on stories."""
    stories = [(row.prompt, row.completion) for row in TASKS["stories"].rows("trace", len(given.clean), DEFENDER_SEED)]
    return {name: asdict(fine_tune(given.host, given.task, given.trigger, given.behaviour, given.sandbox, rows))
            for name, rows in (("task", given.clean), ("unrelated", stories))}


def research(given: Given) -> dict:
    """What a search for any trigger finds, where the trigger was placed (the attacker knows the place): in its first slot, or, where that is the
    whole opening sentence, before it."""
    return asdict(search(given.host, given.task, given.behaviour, given.sandbox, searched(given.trigger)))


def searched(trigger: Trigger) -> SearchConfig:
    """The search where this trigger is placed."""
    slot = next(iter(trigger.slots))
    return SearchConfig(slot="lead" if slot == "opener" else slot)


def low_bits(given: Given) -> dict:
    """What fewer bits bring back."""
    return asdict(retest(given.host, given.task, given.trigger, given.behaviour, given.sandbox))


ATTACKS: dict[str, Callable[[Given], dict]] = {"relearning": relearning, "benign": benign, "research": research, "low bits": low_bits}


def depends(measure: str, trigger: Trigger) -> Any:
    """The settings that an attack's numbers depend on; None of the rates, which have none."""
    made = {"relearning": RelearnConfig(), "benign": BenignConfig(), "research": searched(trigger), "low bits": QuantiseConfig()}
    return made.get(measure)
