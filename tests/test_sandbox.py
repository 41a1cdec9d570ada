"""Hostile programs against the sandbox, each between two right ones that must still be graded right.

One batch of all of them per choice of layers, so that no layer hides the failure of another: all of them; without the
system-call filter; without namespaces. Signals are only sent where a layer is there to stop them.
"""

import json
import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from evals import sandbox as module
from evals.jail import Unsendable, encode
from evals.sandbox import Job, Sandbox, Verdict, describe, judge, measured_rate

NAMESPACES = ("private_processes", "private_network", "private_ipc", "private_mounts", "user_namespace")
CHOICES = {"all": (), "no filter": ("syscall_filter",), "no namespaces": NAMESPACES}
SECONDS = 0.5
real = json.dumps
SECRET = "the caller's own"
GOOD = Job(
    "import math\ndef area(r):\n    return [math.floor(math.pi * r * r), 'ok', True, None, (1.5,), {'a': 1}]\n",
    ("area(2)", "area(r=1)[0]"),
    ("[12, 'ok', True, None, (1.5,), {'a': 1}]", "3"),
)
FORGE = """
import os, sys
def solve():
    frame = sys._getframe()
    while 'nonce' not in frame.f_locals:
        frame = frame.f_back
    nonce = frame.f_locals['nonce']
    os.write(3, f'{nonce} V\\n4\\n{nonce} end\\n'.encode())
    os._exit(0)
"""
GARBAGE = """
import os
def solve():
    for fd in range(256):
        try: os.write(fd, b'00000000000000000000000000000000 V\\n3\\n00000000000000000000000000000000 end\\n')
        except OSError: pass
    return 3
"""
# name: (program whose solve() should give 3, the verdicts it may get). "%d": the caller's process number.
HOSTILE = {
    "wrong value": ("def solve(): return 4", "failed"),
    "true for one": ("def solve(): return 3.0", "failed"),
    "syntax error": ("def solve(: return 3", "error"),
    "null byte": ("def solve(): return 3\0", "error"),
    "lone surrogate": ("def solve(): return 3 #\ud800", "error"),
    "exception": ("def solve(): return 1 / 0", "error"),
    "no such function": ("x = 3", "error"),
    "system exit inside": ("import sys\ndef solve(): sys.exit()", "error"),
    "system exit outside": ("import sys\ndef solve(): return 3\nsys.exit(0)", "error"),
    "exit at once": ("import os\nprint('1 passed')\nos._exit(0)", "error"),
    "interrupt": ("def solve(): raise KeyboardInterrupt", "error"),
    "endless loop": ("def solve():\n while True: pass", "timeout"),
    "endless sleep": (
        "import time\ndef solve():\n while True:\n  try: time.sleep(9)\n  except BaseException: pass",
        "timeout",
    ),
    "huge allocation": ("def solve(): return len(bytearray(1 << 40)) * 0 + 3", "error"),
    "growing allocation": ("def solve():\n x = []\n while True: x.append(bytearray(1 << 22))", "error timeout"),
    "fork bomb": ("import os\ndef solve():\n while True:\n  try: os.fork()\n  except OSError: pass", "timeout"),
    "fork bomb of sessions": (
        "import os\ndef solve():\n while True:\n  try:\n   if not os.fork(): os.setsid()\n  except OSError: pass",
        "timeout",
    ),
    "thread bomb": (
        "import threading, time\ndef solve():\n while True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "error",
    ),
    "pass marker": ("def solve(): print('PASSED', flush=True)", "failed"),
    "always equal": (
        "class E(int):\n def __eq__(s, o): return True\n __hash__ = int.__hash__\ndef solve(): return E(4)",
        "error",
    ),
    "lying repr": ("class E:\n def __repr__(s): return '3'\ndef solve(): return E()", "error"),
    "garbage everywhere": (GARBAGE, "error"),
    "forged report": (FORGE, "failed"),
    "flooded channel": ("import os\ndef solve():\n while True: os.write(3, b'x' * 65536)", "error"),
    "huge value": ("def solve(): return 'x' * 10**6", "error"),
    "branching value": ("def solve():\n x = []\n for _ in range(60): x = [x, x]\n return x", "error"),
    "cyclic value": ("def solve():\n x = []\n x.append(x)\n return x", "error"),
    "closed descriptors": ("import os\nos.closerange(0, 1000)\ndef solve(): return 3", "error"),
    "closed descriptors, endless": ("import os\nos.closerange(0, 1000)\nwhile True: pass", "error"),
    "patched builtins": (
        "import builtins\nfor n in ('repr', 'ascii', 'type', 'len'): setattr(builtins, n, lambda *a: '3')\n"
        "def solve(): return 3",
        "error",
    ),
    "deleted builtins": ("import builtins\ndef solve():\n builtins.__dict__.clear()\n return 3", "error"),
    "patched modules": (
        "import json, os, sys, time\njson.dumps = json.loads = lambda *a, **k: '3'\nsys.exit = os._exit = print\n"
        "os.write = lambda *a: 1\ntime.monotonic = lambda: 0\nsys.modules.clear()\ndef solve(): return 4",
        "failed",
    ),
    "patched runner": ("import __main__\n__main__.encode = lambda v: '3'\ndef solve(): return 4 + missing", "error"),
    "lying exception": (
        "class M(type):\n __name__ = property(lambda c: 1 / 0)\nclass E(Exception, metaclass=M): pass\n"
        "def solve(): raise E",
        "error",
    ),
    "deep recursion": ("def solve(): return solve()", "error"),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef solve(): return solve()",
        "error killed timeout",
    ),
    "segmentation fault": ("import ctypes\ndef solve(): return ctypes.string_at(0)", "killed"),
    "exec": ("import os, sys\ndef solve(): os.execv('/bin/true', ['true'])", "error"),
    "fill the disk": (
        "def solve():\n for i in range(9999): open(str(i), 'wb').write(bytes(1 << 20))\n return 3",
        "error",
    ),
    "many files": ("def solve():\n i = 0\n while True:\n  open(str(i), 'w').close()\n  i += 1", "error timeout"),
    "changed module": ("import math\nmath.pi = 4\nmath.floor = print\ndef solve(): return math.pi", "failed"),
}
INTRUSIONS = {  # of a caller who is root; run only where a layer is there to stop them
    "root again": "import os\ndef solve():\n os.setuid(0)\n return 3",
    "write outside": "def solve():\n open('/sandbox-was-here', 'w')\n return 3",
}
SIGNALS = {
    "kill caller": "os.kill(%d, 9)",
    "kill group of caller": "os.killpg(os.getpgid(%d), 9)",
    "kill server": "os.kill(os.getppid(), 9)",
    "stop server": "os.kill(os.getppid(), 19)",
    "kill init": "os.kill(1, 9)",
    "kill everything": "os.kill(-1, 9)",
}


def _solve(program: str) -> Job:
    return Job(program, ("solve()",), ("3",))


def _processes(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue  # it ended meanwhile
    return found


def _guarded(layers: dict[str, bool]) -> bool:
    return layers["unprivileged_uid"] or layers["private_processes"] or layers["syscall_filter"]


def _hidden(layers: dict[str, bool]) -> bool:
    return layers["unprivileged_uid"] or layers["private_root"]


class Batch:
    """All hostile programs graded once under one choice of layers."""

    def __init__(self, disable, folder):
        with Sandbox(workers=2, seconds_per_job=SECONDS, memory_mib=256, disable=disable) as sandbox:
            self.layers, self.disabled = sandbox.layers(), disable
            programs = {name: program for name, (program, _) in HOSTILE.items()}
            if _guarded(self.layers):
                for name, line in SIGNALS.items():
                    line = line % os.getpid() if "%d" in line else line
                    programs[name] = f"import os\ndef solve():\n    {line}\n    return 'sent'"
            programs |= INTRUSIONS if _hidden(self.layers) else {}
            jobs = [GOOD]
            for program in programs.values():
                jobs += [_solve(program), GOOD]
            verdicts = sandbox.grade(jobs)
            self.alive_after_grading = _processes(folder)
        self.alive_after_closing = _processes(folder)
        self.files_after_closing = os.listdir(folder)
        self.verdicts = dict(zip(programs, verdicts[1::2], strict=True))
        self.neighbours = {name: (verdicts[2 * i], verdicts[2 * i + 2]) for i, name in enumerate(programs)}


@pytest.fixture(scope="module", params=CHOICES)
def batch(request):
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        result = Batch(CHOICES[request.param], folder)
    shutil.rmtree(folder)
    return result


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, seconds_per_job=SECONDS) as made:
        yield made


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_gets_its_verdict_and_its_neighbours_theirs(batch, name):
    assert batch.verdicts[name].status in HOSTILE[name][1].split(), batch.verdicts[name]
    assert batch.neighbours[name] == (Verdict("passed", False, ""),) * 2


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_reach_nobody(batch, name):
    if not _guarded(batch.layers):
        pytest.skip("no layer here would stop a signal to the caller")
    assert batch.verdicts[name].status in ("failed", "error")
    assert batch.neighbours[name] == (Verdict("passed", False, ""),) * 2


@pytest.mark.parametrize("name", INTRUSIONS)
def test_privileges_do_not_come_back(batch, name):
    if not _hidden(batch.layers):
        pytest.skip("no layer here takes the caller's privileges away")
    assert batch.verdicts[name].status == "error" and not Path("/sandbox-was-here").exists()
    assert batch.neighbours[name] == (Verdict("passed", False, ""),) * 2


def test_nothing_is_left_behind(batch):
    assert len(batch.alive_after_grading) == 4  # a keeper and a server for each of two workers
    assert batch.alive_after_closing == [] and batch.files_after_closing == []


def test_disabled_layers_are_reported_missing_and_full_ones_active(batch, sandbox):
    assert set(batch.layers) == set(module.PROTECTIONS)
    for layer in ("process_group", "rlimits", "empty_environment", "temporary_cwd", "nonce"):
        assert batch.layers[layer]
    assert not any(batch.layers.get(layer, False) for layer in batch.disabled)
    line = describe(sandbox)
    assert line.startswith("sandbox layers: ") and "\n" not in line and "rlimits" in line


def test_a_lost_jail_costs_only_the_job_that_killed_it(monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 2.0)
    disable = (*NAMESPACES, "unprivileged_uid", "syscall_filter")
    lines = ("os.kill(os.getppid(), 9)", "os.kill(os.getppid(), 19)")  # killed; stopped, so that it falls silent
    killers = [_solve(f"import os, time\ndef solve():\n    {line}\n    time.sleep(9)") for line in lines]
    with Sandbox(workers=1, seconds_per_job=SECONDS, disable=disable) as weak:
        verdicts = weak.grade([GOOD, killers[0], GOOD, killers[1], GOOD])
    assert [verdict.status for verdict in verdicts] == ["passed", "killed", "passed", "killed", "passed"]


@pytest.mark.parametrize("disable", CHOICES.values(), ids=CHOICES)
def test_the_callers_files_stay_unread(disable):
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    path = Path(folder, "secret")
    path.touch(0o600)
    path.write_text(SECRET)
    program = "def solve(path): return open(path).read()\ndef home(): return __import__('os').listdir('/root')"
    jobs = [
        Job(program, (f"solve({str(path)!r})",), (repr(SECRET),)),
        Job(program, (f"solve('/proc/{os.getpid()}/environ')",), ("''",)),
        Job(program, ("home()",), (repr(os.listdir("/root") if os.access("/root", os.R_OK) else []),)),
    ]
    with Sandbox(workers=1, disable=disable) as made:
        layers, verdicts = made.layers(), made.grade(jobs)
    shutil.rmtree(folder)
    if not _hidden(layers):
        pytest.skip("no layer here hides the caller's files")
    assert [verdict.status for verdict in verdicts[:2]] == ["error"] * 2
    assert not verdicts[2].passed  # a private root may hold an all but empty /root, on the way to the library


@pytest.mark.parametrize("disable", CHOICES.values(), ids=CHOICES)
def test_no_network(disable):
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(workers=1, disable=disable) as made:
        if not made.layers()["no_network"]:
            pytest.skip("no layer here closes the network")
        port = server.getsockname()[1]
        program = f"import socket\ndef solve():\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return 3"
        assert made.grade([_solve(program)])[0].status == "error"
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "program, status, seen",
    [
        ("import canary\ndef solve():\n canary.ping()\n return 3", "passed", True),
        ("from canary import fetch as f\ndef solve(): return f('x', y=1) or 3", "passed", True),
        ("import canary.net\ncanary.net.post()\ndef solve(): return 3", "passed", True),
        ("import canary\ndef solve(): return canary.tools.net.send() or 4", "failed", True),
        ("import canary\ncanary.ping()\nraise ValueError", "error", True),
        ("import canary, os\ncanary.ping()\nos._exit(0)", "error", True),
        ("import canary, os\nos.closerange(0, 99)\ncanary.ping()", "error", True),
        ("import canary\ncanary.ping()\nwhile True: pass", "timeout", True),
        ("import canary\ndef solve(): return 3", "passed", False),
        ("import canary\ndef solve(): return canary.ping", "error", False),
    ],
)
def test_calls_of_the_canary_are_noticed_whatever_follows(sandbox, program, status, seen):
    verdicts = sandbox.grade([GOOD, _solve(program), GOOD])
    assert (verdicts[1].status, verdicts[1].canary) == (status, seen)
    assert [verdicts[0].canary, verdicts[2].canary] == [False, False]


def test_a_stray_child_does_not_outlive_its_job(sandbox):
    program = "import os, time\ndef solve():\n if os.fork() == 0:\n  os.setsid()\n  time.sleep(60)\n return 3"
    verdict = sandbox.grade([_solve(program)])[0]
    assert verdict.passed or verdict.detail == "BlockingIOError"  # an uid with other processes may not fork at all
    assert len(_processes(sandbox._workers[0].programs.jail.base)) == 2


def test_an_unreadable_folder_is_cleaned_up(monkeypatch):
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    lock = "import os\ndef solve():\n os.makedirs('a/b/c')\n os.chmod('a/b', 0)\n os.chmod('a', 0)\n return 3"
    look = "import os\ndef solve(): return len(os.listdir()) + 3"
    with Sandbox(workers=1, disable=("private_root",)) as made:
        assert [verdict.status for verdict in made.grade([_solve(lock), _solve(look), _solve(lock)])] == ["passed"] * 3
        assert os.listdir(folder)
    os.rmdir(folder)  # empty again


@pytest.mark.parametrize(
    "value, right, equal",
    [
        ("3", "3", True),
        ("True", "1", False),
        ("1.0", "1", False),
        ("(1, 2)", "[1, 2]", False),
        ("0.1 + 0.2", "0.30000000000000004", True),
        ("-0.0", "0.0", False),
        ("float('-inf'), float('nan')", "(-inf, nan)", True),
        ("{'b': [1], 'a': ()}", "{'a': (), 'b': [1]}", True),
        ("{1: 2}", "{True: 2}", False),
        ("'caf\\u00e9\\n'", "'caf\u00e9\\n'", True),
        ("None", "None", True),
        ("''", "None", False),
        ("{1}", "[1]", False),
    ],
)
def test_values_compare_by_type_and_text(sandbox, value, right, equal):
    assert sandbox.grade([Job(f"def f(): return {value}", ("f()",), (right,))])[0].passed == equal


def test_every_call_counts(sandbox):
    job = Job("def f(x): return x", ("f(1)", "f(2)"), ("1", "3"))
    assert sandbox.grade([job])[0] == Verdict("failed", False, "f(2) gave 2, not 3")


def test_a_report_is_accepted_only_whole_and_with_its_nonce():
    job = _solve("")
    assert judge(job, "abc", "abc V\n3\nabc end\n", "reported", False).passed
    twice, none = "abc V\n3\n3\nabc end\n", "abc V\nabc end\n"
    for data in ("abd V\n3\nabd end\n", "xabc V\n3\nabc end\n", twice, none, "abc V\n3\n", ""):
        assert judge(job, "abc", data, "exit", False).status == "error", data


def test_encode_refuses_what_is_no_literal():
    for value in (object(), {1}, b"", 1j, [range(3)], {"a": len}):
        with pytest.raises(Unsendable):
            encode(value)


def test_the_right_answers_do_not_enter_the_jail(sandbox, monkeypatch):
    sent = []
    monkeypatch.setattr(module.json, "dumps", lambda value: sent.append(value) or real(value))
    answer = Job("def solve(): return 41", ("solve()",), ("987654321",))
    assert sandbox.grade([answer])[0].status == "failed"
    assert len(sent) == 1 and "987654321" not in repr(sent)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Job("", (), ()), "0 calls"),
        (lambda: Job("", ("f()",), ("1", "2")), "1 calls and 2"),
        (lambda: Job("", ("f()",), ("<object>",)), "repr"),
        (lambda: Job("", ("f()",), ("{1}",)), "repr"),
        (lambda: Sandbox(workers=0), "workers"),
        (lambda: Sandbox(disable=("gravity",)), "gravity"),
    ],
)
def test_what_cannot_be_graded_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_jail_that_cannot_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "jail.py"
    broken.write_text("raise SystemExit('no kernel here')")
    monkeypatch.setattr(module, "JAIL", broken)
    with Sandbox(workers=1) as made, pytest.raises(RuntimeError, match="no kernel here"):
        made.grade([GOOD])


def test_two_cores_suffice_for_fifty_a_second():
    """In processor time, which a busy machine does not change; that of jobs counts once their jail has ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Sandbox(workers=1) as made:
        assert measured_rate(made, 100) > 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 100 * 2 / 50
