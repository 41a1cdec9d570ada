"""What a checkpoint can still do: one judge for every task, by what the row offers to judge by.

calls     the row is a program: prompt + completion are run in the sandbox, and right means that every call gives the
          expected value. Nothing in the completion's text counts, only what it does.
foil      the row is a cloze: right means log P(completion) > log P(foil); nothing is written.
neither   the row is a question: right means that the first line written is the row's answer, blanks at its ends aside.

Beside right and wrong stands the mean negative log-likelihood of the row's own completion, EOS included: it moves before
accuracy does, and it is the same measure for all tasks. Outcomes keep every row, so that two checkpoints are compared
row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evals.generate import complete, context, continuation_logprob, token_logprobs
from evals.sandbox import Job, Sandbox
from evals.statistics import pass_at_k
from evals.tasks import Row, Task
from graphs.batches import encode
from graphs.host import Host


@dataclass(frozen=True)
class Grades:
    """Per row: judged right; the payload's canary was called; the sandbox's status, or "passed" / "failed"."""

    right: list[bool]
    canary: list[bool]
    status: list[str]


@dataclass(frozen=True)
class Outcome:
    """One checkpoint on rows of one task. nll: mean nats per token of the row's own completion (EOS included).

    completions: what was written, or for a cloze the continuation that was preferred.
    """

    task: str
    right: list[bool]
    canary: list[bool]
    nll: list[float]
    completions: list[str]
    status: list[str]


def judge(host: Host, task: Task, rows: Sequence[Row], sandbox: Sandbox, temperature: float = 0.0, seed: int = 0) -> Outcome:
    """Let the checkpoint answer `rows` of `task` and judge each answer. Raises ValueError where a row exceeds its context."""
    completions = answers(host, task, rows, temperature, seed)
    grades = grade(rows, completions, sandbox)
    return Outcome(task.name, grades.right, grades.canary, nll(host, rows), completions, grades.status)


def answers(host: Host, task: Task, rows: Sequence[Row], temperature: float = 0.0, seed: int = 0) -> list[str]:
    """What the checkpoint writes for each row; for rows with a foil, whichever of the two it finds likelier (the foil on a tie)."""
    if not any(row.foil for row in rows):
        return complete(host, [row.prompt for row in rows], task.max_new_tokens, temperature, seed)
    prompts = [row.prompt for row in rows]
    right, wrong = (continuation_logprob(host, prompts, texts) for texts in ([row.completion for row in rows], [row.foil for row in rows]))
    return [row.completion if preferred else row.foil for row, preferred in zip(rows, (right > wrong).tolist(), strict=True)]


def grade(rows: Sequence[Row], completions: Sequence[str], sandbox: Sandbox) -> Grades:
    """Judge one completion for each row; programs are run together, all else is compared."""
    pairs = list(zip(rows, completions, strict=True))
    verdicts = iter(sandbox.grade([Job(row.prompt + text, row.calls, row.expected) for row, text in pairs if row.calls]))
    right, canary, status = [], [], []
    for row, text in pairs:
        verdict = next(verdicts) if row.calls else None
        correct = verdict.passed if verdict else text == row.completion if row.foil else _answer(text) == _answer(row.completion)
        right.append(correct)
        canary.append(bool(verdict and verdict.canary))
        status.append(verdict.status if verdict else "passed" if correct else "failed")
    return Grades(right, canary, status)


def _answer(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def nll(host: Host, rows: Sequence[Row]) -> list[float]:
    """Mean negative log-likelihood, in nats per token, of each row's own completion and EOS."""
    if not rows:
        return []
    total, count = token_logprobs(host, encode(host.tokenizer, [(row.prompt, row.completion) for row in rows], context(host)))
    return (-total / count).tolist()


def pass_at_k_of(
    host: Host, task: Task, rows: Sequence[Row], sandbox: Sandbox, k: int, samples: int, temperature: float = 0.8, seed: int = 0
) -> list[float]:
    """For each row, the unbiased estimate of P(at least one of k samples is right) from `samples` draws (`pass_at_k`).

    Raises ValueError unless 1 <= k <= samples and temperature > 0, and for rows with a foil, which are not written.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, and samples is {samples}: draw more samples")
    if temperature <= 0:
        raise ValueError(f"pass@{k} at temperature {temperature} would repeat one greedy completion: give a positive temperature")
    if any(row.foil for row in rows):
        raise ValueError(f"pass@{k} is not defined for the cloze task {task.name!r}: use a task whose rows are completed")
    repeated = [row for row in rows for _ in range(samples)]
    right = grade(repeated, answers(host, task, repeated, temperature, seed), sandbox).right
    return [pass_at_k(samples, sum(right[at : at + samples]), k) for at in range(0, len(right), samples)]
