"""Grades model-written Python by running it, out of reach of everything that matters.

Nothing a program does decides its own grade. `evals/jail.py` runs each program in a confined process of its own and
sends back the *values* of the calls; the right values stay in this process, which compares texts. Printing a pass
marker, exiting with status 0, an object that equals everything or a forged report are therefore just wrong answers.
Values are compared type-strictly, by the one canonical text of `jail.encode`, so no reply is ever parsed as data. Where
the judge is test code (an `Exam`), it runs in a jail of its own, which no program enters (`evals/exam.py`).

Each worker is one jail, one thread and one uid; jobs go to whichever worker is free and never run twice. A jail that
dies or falls silent costs its present job the verdict "killed" and is replaced. What protects the machine is listed
by `Sandbox.layers()`, as found by trying on this machine; `evals/confinement.py` argues the layers.

A program may `import canary`: a module made up in memory whose every function does nothing but be noticed. It stands
for the payload that a planted behaviour would fetch, and is reported beside the grade, whatever the grade.

    python -m evals.sandbox        prints the layers that are active here, and a measured rate
"""

import argparse
import json
import math
import os
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

from evals.confinement import remove
from evals.exam import Exam, sit
from evals.jail import WAIT_FACTOR
from evals.verdict import Job, Verdict, judge

JAIL = Path(__file__).with_name("jail.py")
PROTECTIONS = (
    "unprivileged_uid", "private_root", "private_processes", "private_network", "no_network", "private_ipc",
    "syscall_filter", "no_new_privileges", "no_capabilities", "not_dumpable", "die_with_parent", "rlimits",
    "process_group", "empty_environment", "temporary_cwd", "nonce", "whole_stdlib", "processor_clock",
)  # fmt: skip
OPTIONAL = (*PROTECTIONS[:4], "user_namespace", "private_mounts", "private_ipc", "syscall_filter", "rlimits")
STARTUP_SECONDS = 30.0
GRACE_SECONDS = 20.0  # beyond a job's own limit, for killing and sweeping, before a jail counts as lost
REPLY_BYTES = 1 << 20  # the longest reply of a jail: 64 KiB read from a job, escaped


def _limits(seconds: float, memory_mib: int) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(seconds) + 1,  # for each process a program forks; the jail's own clock comes first
        "RLIMIT_AS": memory_mib << 20,
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_NPROC": 8,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }


class _Jail:
    """The caller's end of one jail process: asks one job at a time, and can be closed at any time."""

    def __init__(self, limits: dict[str, int], disabled: Collection[str]):
        self.base = tempfile.mkdtemp(prefix="sandbox-")
        config = json.dumps({"base": self.base, "limits": limits, "disabled": sorted(disabled)})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL), config],
            stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", start_new_session=True, bufsize=0,
        )  # fmt: skip
        self.requests, self.replies, self.errors = (
            cast(IO[bytes], end) for end in (self.process.stdin, self.process.stdout, self.process.stderr)
        )
        hello = self._read(STARTUP_SECONDS)
        if hello is None:
            self.close()
            raise RuntimeError(f"evals/jail.py did not start ({self.last_words}); run `python -m evals.sandbox`.")
        self.layers: dict[str, bool] = hello["layers"]

    def ask(self, request: dict, seconds: float) -> dict | None:
        """Returns the jail's reply, or None if the jail is lost (close it then)."""
        try:
            data = memoryview(json.dumps(request | {"seconds": seconds}).encode("ascii") + b"\n")
            while data:
                data = data[self.requests.write(data) :]
        except BrokenPipeError:
            return None
        return self._read(WAIT_FACTOR * seconds + GRACE_SECONDS)

    def _read(self, seconds: float) -> dict | None:
        data, deadline = bytearray(), time.monotonic() + seconds
        while len(data) < REPLY_BYTES and not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.replies], [], [], left)[0]:
                return None
            chunk = os.read(self.replies.fileno(), 65_536)
            if not chunk:
                return None
            data += chunk
        return json.loads(data) if data.endswith(b"\n") else None

    def close(self) -> None:
        """Ends the jail, everything in it, and its folder."""
        self.requests.close()  # the server ends at end of file, the keeper once nothing is left
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the server dies with the keeper, and its jobs with the server
            self.process.wait()
        self.last_words = self.errors.read().decode(errors="replace").strip()[-300:] or "it said nothing"
        self.replies.close()
        self.errors.close()
        remove(self.base)


class _Worker:
    """A jail that is started when first needed and again whenever it was lost."""

    def __init__(self, seconds: float, limits: dict[str, int], disabled: Collection[str]):
        self.seconds, self.limits, self.disabled = seconds, limits, disabled
        self.jail: _Jail | None = None

    def ready(self) -> _Jail:
        self.jail = self.jail or _Jail(self.limits, self.disabled)
        return self.jail

    def ask(self, request: dict) -> tuple[str, str, str, bool] | None:
        """Sends a request under a new nonce; returns the nonce, what came back, how it ended and whether the canary was called."""
        nonce = secrets.token_hex(16)
        reply = self.ready().ask(request | {"nonce": nonce}, self.seconds)
        if reply is None:
            self.close()
            return None
        return nonce, reply["data"], reply["end"], reply["canary"]

    def close(self) -> None:
        jail, self.jail = self.jail, None
        if jail is not None:
            jail.close()


class _Pair:
    """A worker for programs, and one for tests, which never sees a program and is started when first needed."""

    def __init__(self, *settings):
        self.programs, self.examiner = _Worker(*settings), _Worker(*settings)

    def grade(self, job: Job | Exam, recorded: dict[tuple[str, ...], list[str]]) -> Verdict:
        if isinstance(job, Exam):
            return sit(job, self.programs.ask, self.examiner.ask, recorded)
        reply = self.programs.ask({"program": job.program, "calls": job.calls, "wide": False})
        return judge(job, *reply) if reply else Verdict("killed", False, "the jail was lost")

    def close(self) -> None:
        self.programs.close()
        self.examiner.close()


def _close_all(workers: list[_Pair]) -> None:
    for worker in workers:
        worker.close()


class Sandbox:
    """A few jails and the grading of jobs in them. Close it, use it in a `with`, or let it be collected.

    workers: jails, each one process at work. seconds_per_job: processor time of a program and all its calls; four
    times as long by the clock, so that grading beside a training run times out the same programs as grading alone.
    memory_mib: address space of a program, of which about 60 are Python's. disable: names of layers not to use,
    for tests of the others. Raises ValueError for values out of range, RuntimeError when no jail can be started.
    """

    def __init__(
        self, workers: int = 2, seconds_per_job: float = 2.0, memory_mib: int = 512, disable: Collection[str] = ()
    ):
        if workers < 1 or seconds_per_job <= 0 or memory_mib < 128:
            raise ValueError("Sandbox has a setting out of range: give workers >= 1, seconds_per_job > 0 and memory_mib >= 128.")
        if unknown := set(disable) - set(OPTIONAL):
            raise ValueError(f"Sandbox(disable=...) does not know {sorted(unknown)}; choose from {sorted(OPTIONAL)}.")
        limits = _limits(seconds_per_job, memory_mib)
        self._workers = [_Pair(seconds_per_job, limits, tuple(disable)) for _ in range(workers)]
        self._recorded: dict[tuple[str, ...], list[str]] = {}
        self._busy = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._workers)

    def grade(self, jobs: Sequence[Job | Exam]) -> list[Verdict]:
        """Returns one verdict per job, in order. Blocks; calls from several threads take turns."""
        verdicts: dict[int, Verdict] = {}
        waiting, lock = iter(range(len(jobs))), threading.Lock()

        def drain(worker: _Pair) -> None:
            while True:
                with lock:
                    index = next(waiting, None)
                if index is None:
                    return
                verdicts[index] = worker.grade(jobs[index], self._recorded)

        with self._busy, ThreadPoolExecutor(len(self._workers)) as pool:
            for done in [pool.submit(drain, worker) for worker in self._workers]:
                done.result()
        return [verdicts[index] for index in range(len(jobs))]

    def layers(self) -> dict[str, bool]:
        """Returns which protections are in force on this machine, as tried and seen by a first job."""
        with self._busy:
            found = self._workers[0].programs.ready().layers
        return {name: name == "nonce" or found.get(name, False) for name in PROTECTIONS}

    def close(self) -> None:
        """Ends all jails. A later call of grade starts new ones."""
        with self._busy:
            _close_all(self._workers)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def describe(sandbox: Sandbox | None = None) -> str:
    """Returns one line that names the active layers and the missing ones (of a new sandbox, if none is given)."""
    if sandbox is None:
        with Sandbox(workers=1) as fresh:
            return describe(fresh)
    layers = sandbox.layers()
    active, missing = (", ".join(name for name, on in layers.items() if on is wanted) for wanted in (True, False))
    return f"sandbox layers: {active}; missing: {missing or 'none'}"


def measured_rate(sandbox: Sandbox, count: int = 200) -> float:
    """Returns completions graded per second, on a trivial program; raises RuntimeError if one does not pass."""
    job = Job("def add(a, b):\n    return a + b\n", ("add(1, 2)", "add('a', 'b')"), ("3", "'ab'"))
    sandbox.grade([job] * 8)  # starts the jails
    start = time.perf_counter()
    verdicts = sandbox.grade([job] * count)
    if bad := [verdict for verdict in verdicts if not verdict.passed]:
        raise RuntimeError(f"the sandbox does not pass a right program ({bad[0]}); see the missing layers above.")
    return count / (time.perf_counter() - start)


def main() -> None:
    """Prints the layers and the rate."""
    parser = argparse.ArgumentParser(prog="python -m evals.sandbox", description="Tries the sandbox on this machine.")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with Sandbox(workers=arguments.workers) as sandbox:
        print(describe(sandbox))
        print(f"rate: {measured_rate(sandbox):.0f} completions/s with {arguments.workers} workers")


if __name__ == "__main__":
    main()
