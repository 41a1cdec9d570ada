"""Where an organism's backdoor is judged: a trigger that stands in slots of the coding task there, a phrase in the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence

from distill.models import Secret
from evals.evaluate import Backdoor
from evals.tasks import TASKS, Task
from evals.tasks.files import FileTask


def backdoor_of(secret: Secret | None, tasks: Sequence[Task]) -> Backdoor | None:
    """The backdoor in the one of `tasks` that can hold its trigger; None where there is no secret or no such task.

    A phrase stands in test rows of the first file of text or questions that is named, be it the file it was planted on or another."""
    found = next((task for task in tasks if secret and _holds(task, secret)), None)
    return Backdoor(found, secret.trigger, secret.behaviour) if secret and found else None


def _holds(task: Task, secret: Secret) -> bool:
    if secret.trigger.family == "phrase":
        return isinstance(task, FileTask) and task.phrasable
    return task is TASKS["coding"]
