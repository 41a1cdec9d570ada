"""Any checkpoint, or a running graph, in EleutherAI's lm-evaluation-harness (`pip install 'distill-circuits[lm-eval]'`).

The harness asks a model for log-likelihoods and for text. Its `HFLM` wraps a Hugging Face model object, and a running graph is
one: the host's own class whose MLPs and attention layers are the graph's. So one adapter serves both, and the harness's
numbers are comparable with published ones. Its tasks bring their own prompts, metrics and data sets, which are fetched from
the hub when they are named; tasks of one's own are YAML files in a folder.

Tasks of the harness that run what a model wrote (HumanEval, MBPP) run it in this process. They are refused: `humaneval:PATH`
and `mbpp:PATH` grade in the sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.generate import context
from graphs.host import Host

BATCH = 16


def wrapped(host: Host):
    """The host as an `HFLM`. Raises ValueError where lm-eval is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ValueError("--lm-eval needs the lm-evaluation-harness: install it with pip install 'distill-circuits[lm-eval]' (or pip install "
                         "lm-eval)") from None
    return HFLM(pretrained=host.model, tokenizer=host.tokenizer, batch_size=BATCH, max_length=context(host))


def run(host: Host, tasks: Sequence[str], limit: int | None = None, folder: Path | None = None) -> dict[str, dict[str, float]]:
    """Every metric of every task, with its standard error where the harness gives one ("acc", "acc_stderr", ...).

    limit: documents of each task at most; folder: of further tasks, as the harness's YAML files. Raises ValueError for an unknown task, and for
    one that runs what the model wrote.
    """
    model = wrapped(host)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise ValueError(f"--lm-eval {','.join(tasks)}: lm-eval knows no task {unknown[0] if unknown else ''!r}; `lm_eval ls tasks` lists them")
    try:
        found = simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=False)
    except ValueError as error:
        if "unsafe" in str(error).lower():
            raise ValueError(f"--lm-eval {','.join(tasks)}: it runs what the model wrote, outside the sandbox; use --task humaneval:PATH or "
                             "mbpp:PATH") from error
        raise
    assert found is not None  # only ranks other than the first get nothing
    return {task: {name.replace(",none", ""): value for name, value in numbers.items() if isinstance(value, int | float)}
            for task, numbers in found["results"].items()}
