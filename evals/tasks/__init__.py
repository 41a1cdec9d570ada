"""The tasks by name: `coding`, `math`, `stories`."""

from evals.tasks.arithmetic import Arithmetic
from evals.tasks.coding import Coding
from evals.tasks.stories import Stories
from evals.tasks.task import SPLITS, Row, Split, Task, table

TASKS: dict[str, Task] = {task.name: task for task in (Coding(), Arithmetic(), Stories())}


def named(names: str) -> list[Task]:
    """The tasks of a comma-separated list. Raises ValueError (one sentence) on an unknown name."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        raise ValueError(f"--task {names!r}: no such task; choose from {', '.join(TASKS)} (several: coding,math)")
    return [TASKS[name] for name in wanted]


__all__ = ["SPLITS", "TASKS", "Row", "Split", "Task", "named", "table"]
