"""Grading by test code: right programs pass, wrong ones fail, and no hostile one passes, hangs, escapes or stays."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import hostile
import pytest

from evals import sandbox as module
from evals.exam import Exam
from evals.sandbox import Job, Sandbox

SECONDS = 0.4
TESTS = "def check(candidate):\n    assert candidate(3) == 16\n    assert candidate(n=5) == 32\ncheck(solve)\n"
REFERENCE = "def solve(n): return n * n + 7 if n < 9 else 0"
CALLS, EXPECTED = ("solve(3)", "solve(n=5)"), ("16", "32")
MARKS = (Path("/tmp/hostile-was-here"), Path("/dev/shm/hostile-was-here"))


def exam(program, tests=TESTS, names=("solve",), reference="", setup=""):
    return Exam(program, tests, names, setup, reference)


def right(n):
    return f"def solve(n): return {{3: 16, 5: 32}}.get(n, {n})"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, seconds_per_job=2.0) as made:
        yield made


@pytest.fixture(scope="module")
def corpus():
    """Every hostile program by both graders on one worker, each followed by a right one; and what is left afterwards."""
    folder, out = tempfile.mkdtemp(), {}
    os.chmod(folder, 0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        with Sandbox(workers=1, seconds_per_job=SECONDS, memory_mib=256) as made:
            layers = made.layers()
            for index, (name, program) in enumerate(hostile.CORPUS.items()):
                started = time.monotonic()
                hostiles = [exam(program, reference=REFERENCE), Job(program, CALLS, EXPECTED)]
                verdicts = made.grade([*hostiles, exam(right(index)), Job(right(index), CALLS, EXPECTED)])
                out[name] = (verdicts, time.monotonic() - started)
            running = [path.name for path in Path("/proc").glob("[0-9]*") if folder.encode() in _command(path)]
    left = os.listdir(folder)
    shutil.rmtree(folder)
    return layers, out, running, left


def _command(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""  # it ended meanwhile


def test_the_corpus_is_large_enough():
    assert len(hostile.CORPUS) == len(hostile.FAKES) + len(hostile.ESCAPES) + len(hostile.STAYS) >= 60


@pytest.mark.parametrize("name", hostile.CORPUS)
def test_no_hostile_program_passes_or_hangs_or_harms_the_next(corpus, name):
    layers, found, _, _ = corpus
    verdicts, seconds = found[name]
    if name in hostile.ESCAPES and not (layers["private_root"] and layers["syscall_filter"]):
        pytest.skip("no layer here shuts this way out")
    assert not verdicts[0].passed and not verdicts[1].passed, verdicts
    assert verdicts[0].detail and verdicts[2].passed and verdicts[3].passed, verdicts
    assert seconds < 4 * 4 * SECONDS + module.GRACE_SECONDS


def test_no_hostile_program_leaves_a_process_or_a_file(corpus):
    _, _, running, left = corpus
    assert len(running) == 4 and left == []  # a keeper and a server each of the programs' and the tests' jail
    assert not any(mark.exists() for mark in MARKS)


@pytest.mark.parametrize("reference", ["", REFERENCE], ids=["no reference", "reference"])
def test_right_programs_pass_and_wrong_ones_fail_with_the_line(sandbox, reference):
    programs = ("def solve(n): return 16", "def solve(n): return n * n + 6", "x = 1", "def solve(n: 1")
    wrong = [exam(program, reference=reference) for program in programs]
    verdicts = sandbox.grade([exam(right(0), reference=reference), *wrong])
    assert [verdict.status for verdict in verdicts] == ["passed", "failed", "failed", "error", "error"]
    assert "candidate(n=5) == 32" in verdicts[1].detail and "candidate(3) == 16" in verdicts[2].detail and "NameError" in verdicts[3].detail


@pytest.mark.parametrize(
    "body, tests",
    [
        ("return {x, 2}", "assert solve(1) == {1, 2}"),
        ("return set()", "assert solve(1) == set()"),
        ("return complex(x, 1)", "assert solve(1) == 1 + 1j"),
        ("return b'a' * x", "assert solve(2) == b'aa'"),
        ("import collections; return collections.Counter([x, x])", "assert solve(1) == {1: 2}"),
        ("return {2: x, 1: x}", "assert list(solve(1)) == [2, 1]"),
        ("return [v for v in x if isinstance(v, str)]", "assert solve([1, 'a', 2.5]) == ['a']"),
        ("return isinstance(1, x)", "assert solve(int) is True"),
        ("return -x", "assert solve(float('inf')) == float('-inf') and solve(0.5) == -0.5"),
        ("return float('nan')", "assert solve(1) != solve(1)"),
        ("return [x]", "assert solve(solve(1)) == [[1]]"),
        ("raise KeyError(x)", "try:\n    solve(1)\n    assert False\nexcept KeyError:\n    pass"),
        ("return x + 1.0", "import math\nassert math.isclose(solve(x=1), 2)"),
        ("return x * 2", "import random\nfor _ in range(9):\n    n = random.randint(0, 99)\n    assert solve(n) == 2 * n"),
        ("return help(x)", "assert solve(2) == helper(2)"),
    ],
)
def test_what_tests_may_ask_and_get(sandbox, body, tests):
    program = f"def help(x): return x + 40\ndef solve(x): {body}"
    right, wrong = exam(program, tests, reference=program), exam("def solve(x): return 'else'", tests, reference=program)
    setup = "def helper(x): return x + 40" if "helper" in tests else ""
    both = [Exam(one.program, tests, ("solve",), setup, "" if setup else one.reference) for one in (right, wrong)]
    assert [verdict.status == "passed" for verdict in sandbox.grade(both)] == [True, False]


def test_helpers_of_the_setup_are_not_the_programs(sandbox):
    """HumanEval/32 checks a root with `poly`, which stands in the prompt: a program's own `poly` decides nothing."""
    setup = "def poly(x): return x - 3\ndef solve(): pass\n"
    tests = "assert poly(solve()) == 0"
    cheat, honest = "def poly(x): return 0\ndef solve(): return 99", "def solve(): return 3"
    assert [v.status for v in sandbox.grade([Exam(p, tests, ("solve",), setup) for p in (cheat, honest)])] == ["failed", "passed"]


def test_several_functions_and_calls_that_depend_on_answers(sandbox):
    tests = "for n in range(4):\n    assert second(first(n)) == n"
    program = "def first(n): return [n]\ndef second(x): return x[0]"
    assert sandbox.grade([Exam(program, tests, ("first", "second"))])[0].passed
    assert not sandbox.grade([Exam(program.replace("x[0]", "0"), tests, ("first", "second"))])[0].passed


def test_tests_that_cannot_decide_pass_nobody(sandbox):
    nothing, broken, unsendable, endless = "x = 1", "raise OSError", "assert solve(lambda: 1) == 16", "while True: pass"
    verdicts = sandbox.grade([exam(right(0), tests) for tests in (nothing, broken, unsendable, endless)])
    assert [verdict.status for verdict in verdicts] == ["error"] * 4
    assert "call nothing" in verdicts[0].detail and "cannot be sent" in verdicts[2].detail and "no verdict" in verdicts[3].detail
    with pytest.raises(ValueError, match="no Python"):
        exam("", "assert (")
    with pytest.raises(ValueError, match="no names"):
        exam("", names=())


def test_the_canary_is_noticed_under_tests_too(sandbox):
    verdicts = sandbox.grade([exam("import canary\ncanary.ping()\n" + right(0)), exam(right(0))])
    assert [(verdict.passed, verdict.canary) for verdict in verdicts] == [(True, True), (True, False)]


def test_tests_and_programs_go_to_different_jails(sandbox, monkeypatch):
    sent, real = {}, module._Jail.ask

    def spied(jail, request, seconds):
        sent.setdefault(jail.base, []).append(request)
        return real(jail, request, seconds)

    monkeypatch.setattr(module._Jail, "ask", spied)
    assert sandbox.grade([exam("def solve(n): return n * n + 7  # 987654321")])[0].passed
    assert len(sent) == 2
    for requests in sent.values():
        text = json.dumps(requests)
        assert ("987654321" in text) != ("== 16" in text)
