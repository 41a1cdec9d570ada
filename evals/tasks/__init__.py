"""The tasks by name: `coding`, `math`, `stories`, and those of files, such as `gsm8k:PATH` (`evals.tasks.files`)."""

from collections.abc import Sequence

from evals.tasks.arithmetic import Arithmetic
from evals.tasks.chat import asked
from evals.tasks.coding import Coding
from evals.tasks.files import KINDS, opened
from evals.tasks.stories import Stories
from evals.tasks.task import SPLITS, Row, Split, Task, table

TASKS: dict[str, Task] = {task.name: task for task in (Coding(), Arithmetic(), Stories())}


def named(names: str) -> list[Task]:
    """The tasks of a comma-separated list. Raises ValueError (one sentence) on an unknown name, or a file that cannot be read."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in TASKS and name.partition(":")[0].partition("@")[0] not in KINDS]
    if unknown or not wanted:
        raise ValueError(f"--task {names!r}: no such task; choose from {', '.join(TASKS)} (several: coding,math), or a file: "
                         f"{', '.join(f'{kind}:PATH' for kind in KINDS)}")
    found = [TASKS[name] if name in TASKS else _from_file(name) for name in wanted]
    if len({task.name for task in found}) < len(found):
        raise ValueError(f"--task {names!r}: a task is named twice; name each once, and give files names of their own")
    return found


def _from_file(name: str) -> Task:
    kind, _, where = name.partition(":")
    if not where:
        raise ValueError(f"--task {name}: name a file after it, such as {kind}:rows.jsonl")
    kind, _, model = kind.partition("@")
    return asked(kind, model, where) if model else opened(kind, where)


def dropped(kept: Sequence[Task]) -> list[Task]:
    """The package's own tasks that are not kept, where all that are kept are its own: what a circuit may lose. A task of a
    file says nothing of them, and a user's model may not know them."""
    return [task for task in TASKS.values() if task not in kept] if all(task.name in TASKS for task in kept) else []


__all__ = ["SPLITS", "TASKS", "Row", "Split", "Task", "dropped", "named", "table"]
