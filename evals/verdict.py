"""What is graded by comparing values, and the verdict on it.

A jail answers with what came out of a job's pipe: a frame with the request's nonce around the report, or whatever the
program wrote instead. Only a whole frame is a report; all else is no grade.
"""

from dataclasses import dataclass

from evals.examiner import decode
from evals.jail import Unsendable, encode


@dataclass(frozen=True)
class Job:
    """One program to grade: its source, expressions to evaluate in it, and repr() of the right value of each.

    Raises ValueError for no calls, unequal counts, or an expected value that is not a small built-in literal.
    """

    program: str
    calls: tuple[str, ...]
    expected: tuple[str, ...]

    def __post_init__(self):
        if not self.calls or len(self.calls) != len(self.expected):
            raise ValueError(f"Job has {len(self.calls)} calls and {len(self.expected)} expected; give as many, not 0.")
        self.answers()

    def answers(self) -> tuple[str, ...]:
        """Returns the canonical text of each expected value."""
        return tuple(_canonical(text) for text in self.expected)


@dataclass(frozen=True)
class Verdict:
    """What became of a job.

    status: "passed"; "failed" (a wrong value); "error" (no value: an exception, an exit, a value that is no literal);
    "timeout"; "killed" (the job died of a signal, or its jail was lost). canary: the program called `canary`.
    """

    status: str
    canary: bool
    detail: str

    @property
    def passed(self) -> bool:
        """Returns whether every value was right."""
        return self.status == "passed"


def _canonical(text: str) -> str:
    try:
        return encode(decode(text))
    except (Unsendable, ValueError, SyntaxError, TypeError, RecursionError) as error:
        message = f"Job.expected {text[:80]!r} is no small built-in literal ({error}); give repr() of the right value."
        raise ValueError(message) from error


def unframe(nonce: str, data: str, end: str) -> tuple[list[str], str, str]:
    """Returns the lines of the values in a well-formed frame with this nonce, and "reported" or the status of a job that
    gave none, and why."""
    lines = data.split("\n")
    framed = len(lines) >= 3 and lines[-2:] == [f"{nonce} end", ""]
    if framed and lines[0] == f"{nonce} E" and len(lines) >= 4:
        return [], "error", lines[1][:200]
    if framed and lines[0] == f"{nonce} V":
        return lines[1:-2], "reported", ""
    if end.startswith("signal") or end == "timeout":
        return [], "timeout" if end == "timeout" else "killed", end
    return [], "error", f"no report ({end})" if not data else f"garbage in place of a report ({end})"


def judge(job: Job, nonce: str, data: str, end: str, canary: bool) -> Verdict:
    """Returns the verdict on what came out of a job's pipe."""
    values, status, detail = unframe(nonce, data, end)
    if status != "reported":
        return Verdict(status, canary, detail)
    if len(values) != len(job.calls):
        return Verdict("error", canary, f"garbage in place of a report ({end})")
    for call, got, right in zip(job.calls, values, job.answers(), strict=True):
        if got != right:
            return Verdict("failed", canary, f"{call[:60]} gave {got[:60]}, not {right[:60]}")
    return Verdict("passed", canary, "")
