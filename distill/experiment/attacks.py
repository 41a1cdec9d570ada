"""Attacks on what a removal made, by name: each is given the same, and returns JSON-able numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backdoor.behaviours import Behaviour
from backdoor.triggers import Trigger
from evals.sandbox import Sandbox
from evals.tasks import Task
from graphs.host import Host


@dataclass(frozen=True)
class Given:
    """What an attack is given: the model, the backdoor, poisoned and clean rows to train on, and how many prompts to judge by."""

    host: Host
    task: Task
    trigger: Trigger
    behaviour: Behaviour
    sandbox: Sandbox
    prompts: int
    seed: int
    poisoned: list[tuple[str, str]]
    clean: list[tuple[str, str]]


ATTACKS: dict[str, Callable[[Given], dict]] = {}
