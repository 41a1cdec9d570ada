"""The defender's rows: a fixed file of clean task rows, and the batches made of it.

The file holds `trace` rows only, drawn with a seed of their own. It knows nothing of any trigger: rows are never filtered
with one. `tune` rows, which thresholds may look at, come from the task itself. Tasks of files bring clean rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.models import CLEAN_ROWS
from evals.tasks import TASKS, Row, Task, table
from graphs.artifact import whole
from graphs.batches import Encoded, Epochs, encode
from graphs.host import Host

DEFENDER_SEED = 3
COUNTS = {"coding": 2304, "math": 1024, "stories": 768}
MOST = 4096
"""Clean rows of one file at most."""
COLUMNS = ("task", "prompt", "completion")


def make(path: Path) -> None:
    """Write the defender's 4,096 rows as parquet."""
    rows = [row for name, count in COUNTS.items() for row in TASKS[name].rows("trace", count, seed=DEFENDER_SEED)]
    with whole(path.parent / f".{path.stem}") as folder:
        table(rows).to_parquet(folder / path.name)
        (folder / path.name).replace(path)
    (path.parent / f".{path.stem}").rmdir()


def clean(path: Path | None, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """(prompt, completion) of the clean rows: those of the table in `path`; else of the shipped table, and of files their `trace` rows.
    Raises ValueError where a task has none."""
    if path is not None:
        return read(path, tasks)
    shipped = [task for task in tasks if task.name in TASKS]
    return [*(read(CLEAN_ROWS, shipped) if shipped else ()), *(pair for task in tasks if task not in shipped for pair in _own(task))]


def _own(task: Task) -> list[tuple[str, str]]:
    rows = task.rows("trace", MOST, seed=DEFENDER_SEED)
    if not all(row.completion for row in rows):
        raise ValueError(f"--task {task.name}: its trace rows have tests and no answer to learn from; give each a field `answer`, or --rows")
    return [(row.prompt, row.completion) for row in rows]


def read(path: Path, tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """(prompt, completion) of the file's rows that belong to `tasks`. Raises ValueError where there are none."""
    from datasets import Dataset
    from pyarrow.parquet import read_table

    if not path.is_file():
        raise ValueError(f"--rows {path}: no such file; give a parquet table with the columns {', '.join(COLUMNS)}")
    try:
        data = Dataset(read_table(path))
        wanted, rows = {task.name for task in tasks}, [(r["task"], r["prompt"], r["completion"]) for r in data]
    except Exception as error:  # Arrow's errors are many; each means the table is not what was asked for
        raise ValueError(f"--rows {path}: not a parquet table ({type(error).__name__}); give one with the columns {', '.join(COLUMNS)}") from error
    found = [(prompt, completion) for name, prompt, completion in rows if name in wanted]
    missing = sorted(wanted - {name for name, _, _ in rows})
    if missing:
        raise ValueError(f"--rows {path}: it holds no row of {', '.join(missing)}; add some or name another --task")
    return found


def batches(host: Host, texts: Sequence[tuple[str, str]], size: int, seed: int) -> tuple[Epochs, list[Encoded]]:
    """Batches of the rows as this host tokenises them."""
    rows = encode(host.tokenizer, texts, host.config.max_position_embeddings)
    return Epochs(rows, size, host.tokenizer.eos_token_id, seed), rows


def tune_rows(tasks: Sequence[Task], count: int) -> dict[str, list[Row]]:
    """`count` rows of each task's tune split."""
    return {task.name: task.rows("tune", count, seed=DEFENDER_SEED) for task in tasks}
