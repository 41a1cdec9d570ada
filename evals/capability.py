"""What a checkpoint can still do: one judge for every task, by what the row offers to judge by.

calls     the row is a program: prompt + completion are run in the sandbox, and right means that every call gives the
          expected value. Nothing in the completion's text counts, only what it does.
tests     the row is a program with published test code: right means that the tests pass, in a jail of their own (`evals/exam.py`).
number    the row is a question with a worked answer: right means that the number after "####", or else the last number written, is equal.
foil      the row is a cloze: right means log P(completion) > log P(foil); nothing is written.
neither   the row is a question: right means that the first lines written, as many as the row's answer has, are that answer,
          blanks at their ends aside.

Beside right and wrong stands the mean negative log-likelihood of the row's own completion, EOS included: it moves before
accuracy does, and it is the same measure for all tasks. Outcomes keep every row, so that two checkpoints are compared
row by row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from evals.exam import Exam
from evals.generate import complete, context, continuation_logprob, token_logprobs
from evals.sandbox import Job, Sandbox
from evals.statistics import pass_at_k
from evals.tasks import Row, Task
from graphs.batches import Encoded, encode
from graphs.host import Host
from graphs.processes import agreed

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


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
        return [_cut(text, task.stops) for text in complete(host, [row.prompt for row in rows], task.max_new_tokens, temperature, seed)]
    prompts = [row.prompt for row in rows]
    right, wrong = (continuation_logprob(host, prompts, texts) for texts in ([row.completion for row in rows], [row.foil for row in rows]))
    return [row.completion if preferred else row.foil for row, preferred in zip(rows, (right > wrong).tolist(), strict=True)]


def grade(rows: Sequence[Row], completions: Sequence[str], sandbox: Sandbox) -> Grades:
    """Judge one completion for each row; programs are run together, all else is compared."""
    pairs = list(zip(rows, completions, strict=True))
    verdicts = iter(agreed(lambda: sandbox.grade([job(row, text) for row, text in pairs if _runs(row)])))
    right, canary, status = [], [], []
    for row, text in pairs:
        verdict = next(verdicts) if _runs(row) else None
        correct = verdict.passed if verdict else _right(row, text)
        right.append(correct)
        canary.append(bool(verdict and verdict.canary))
        status.append(verdict.status if verdict else "passed" if correct else "failed")
    return Grades(right, canary, status)


def _runs(row: Row) -> bool:
    return bool(row.calls or row.tests)


def job(row: Row, text: str) -> Job | Exam:
    """What the sandbox is asked of a row that is run."""
    if row.calls:
        return Job(row.prompt + text, row.calls, row.expected)
    return Exam(row.prompt + text, row.tests, row.names, row.setup, row.prompt + row.completion if row.completion else "")


def _right(row: Row, text: str) -> bool:
    """The verdict on a row that is not run."""
    if row.number:
        return number_in(text) == number_in(row.number)
    if row.foil:
        return text == row.completion
    wanted = row.completion.strip().split("\n")
    written = text.split("\n") if len(wanted) == 1 else text.strip().split("\n")
    return [line.strip() for line in written[: len(wanted)]] == [line.strip() for line in wanted]


def number_in(text: str) -> Decimal | None:
    """The number after the last "####", or else the last number in the text; None where there is none. 1,000 and 1000.0 are equal."""
    marked = text.rpartition("####")[2] if "####" in text else ""
    found = NUMBER.findall(marked)[:1] or NUMBER.findall(text)[-1:]
    return Decimal(found[0].replace(",", "")) if found else None


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def nll(host: Host, rows: Sequence[Row]) -> list[float]:
    """Mean negative log-likelihood, in nats per token, of each row's own completion and EOS (no EOS where the text goes on)."""
    if not rows:
        return []
    encoded = encode(host.tokenizer, [(row.prompt, row.completion) for row in rows], context(host))
    total, count = token_logprobs(host, [one if row.whole else Encoded(one.ids[:-1], one.prompt) for row, one in zip(rows, encoded, strict=True)])
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
