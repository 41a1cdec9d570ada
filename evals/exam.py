"""Grading by published test code, with the program and the tests in two jails that never meet.

    examiner's jail   the tests with the reference solution's functions: which calls they make        once for a task
    program's jail    the program, then these calls in its names; values come back as texts
    examiner's jail   the tests again, each call answered with the program's value                    passed or not

As for a `Job`, what a program can win is to be asked: it is never given the tests, it runs in no process that ever held
them, and it reports plain values only. A verdict is the examiner's word, in whose jail no program ever ran. The price: what
tests see of a program is values. A function that a test passes to the program, an object of the program's own class, or
a list changed in place and looked at afterwards do not cross, and such a task is graded "error" for any program.

Programs should be deterministic: where tests choose a call by what the last one gave, the program is run again with all
calls so far (`ROUNDS` times at most). `random` is seeded for the tests, and not for the program.
"""

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass

from evals.verdict import Verdict, unframe

Ask = Callable[[dict], tuple[str, str, str, bool] | None]
"""Sends a request to a jail; returns its nonce, data, end and whether the canary was called, or None if the jail is lost."""
ROUNDS = 40
"""Most runs of one program."""


@dataclass(frozen=True)
class Exam:
    """One program and its tests. names: functions of the program that the tests call; setup: run before the tests, in the
    examiner's jail; reference: a whole right program, where there is one.

    Raises ValueError for no names, or tests that are no Python.
    """

    program: str
    tests: str
    names: tuple[str, ...]
    setup: str = ""
    reference: str = ""

    def __post_init__(self):
        if not self.names:
            raise ValueError("Exam has no names: name the functions that its tests call.")
        try:
            compile(self.tests, "<tests>", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"Exam.tests is no Python ({error}); correct it.") from error

    @property
    def key(self) -> tuple[str, ...]:
        """All but the program."""
        return (self.tests, *self.names, self.setup, self.reference)


def sit(exam: Exam, program: Ask, examiner: Ask, recorded: dict[tuple[str, ...], list[str]]) -> Verdict:
    """Returns the verdict on one program. recorded: the calls of exams seen before, to which this one's are added."""
    if exam.key not in recorded:
        found = _examined(exam, examiner, exam.reference, []) if exam.reference else None
        recorded[exam.key] = found[2] if found else []
    calls, canary = recorded[exam.key], False
    for _ in range(ROUNDS):
        reply = program({"program": exam.program, "calls": calls, "wide": True})
        if reply is None:
            return Verdict("killed", canary, "the jail was lost")
        values, status, detail = unframe(*reply[:3])
        canary = canary or reply[3]
        if status != "reported" or len(values) != len(calls):
            return Verdict(status if status != "reported" else "error", canary, detail or "garbage in place of a report")
        found = _examined(exam, examiner, "", list(zip(calls, values, strict=True)))
        if found is None:
            return Verdict("error", canary, "the tests themselves gave no verdict")
        if found[0] == "passed" and not found[2]:
            return Verdict("error", canary, "the tests call nothing of the program")
        if found[0] != "asks":
            return Verdict(found[0], canary, found[1])
        calls = found[2]
    return Verdict("error", canary, f"the tests go on asking after {ROUNDS} runs")


def _examined(exam: Exam, examiner: Ask, reference: str, answers: list[tuple[str, str]]) -> tuple[str, str, list[str]] | None:
    """Status, detail and calls of one run of the tests."""
    material = {key: value for key, value in asdict(exam).items() if key not in ("program", "reference")}
    reply = examiner({"exam": material | {"reference": reference, "answers": answers}})
    lines, status, _ = unframe(*reply[:3]) if reply else ([], "killed", "")
    if status != "reported":
        return None
    said, detail, *asked = (ast.literal_eval(line) for line in lines)
    return said, detail, asked
