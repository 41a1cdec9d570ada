"""The inside of the sandbox: one process that runs model-written programs, each in a fork of its own.

`evals.sandbox` starts this file as `python -I -S jail.py CONFIG`. It uses only the standard library and imports
nothing of the project (`confinement.py` beside it is loaded by path), so a program has nothing of ours to patch; the
grading half shares only `encode`.

Processes. A *keeper* (the process the caller started) makes the namespaces and forks the *server*, which is then
process 1 of a private process namespace. The server forks one *job* per program. Only jobs run foreign code. The
server keeps the identity it was started with and each job gives it up: a job thus has another uid than the server,
can neither signal nor trace it, and starts from the server's memory, in which no program ever ran. Forking costs a
few milliseconds where starting Python costs tens.

Test code (`evals/examiner.py`) is run in a jail of its own, which is never given a program: see `evals/exam.py`.

What a program can win. The right answers are not in here. A job reports *values*, and the caller compares; whoever
forges a report must still know the answer. The nonce in the report only tells it from garbage on the same pipe.

Not covered: channels through the machine's load, and kernel bugs. The hash order of strings is random per server, as
usual in Python: a program whose answer depends on the order of a set is graded by luck.
"""

import builtins
import collections
import importlib
import importlib.machinery
import importlib.util
import json
import mmap
import os
import select
import sys
import time
import types
from functools import partial

# Imported before the fork: a job then need not (nor, without private_root, always could) read them from disk.
PRELOADED = (
    "abc array ast base64 bisect calendar cmath collections collections.abc contextlib copy csv dataclasses datetime "
    "decimal enum fractions functools hashlib heapq inspect io itertools json math numbers operator os.path queue "
    "random re secrets statistics string struct sys textwrap threading time traceback types typing unicodedata uuid"
)
VALUE_CHARACTERS = 16_384  # the longest encoded value
WAIT_FACTOR = 4  # how much longer a job may take by the clock on the wall than in processor time
CHANNEL_BYTES = 65_536  # the most that is read from one job
JOB_DIRECTORY = "/job"

_ascii, _type, _len, _sorted, _exec, _eval, _compile = ascii, type, len, sorted, exec, eval, compile
_int, _bool, _float, _str, _list, _tuple, _dict, _none = int, bool, float, str, list, tuple, dict, type(None)
_sets, _dicts, _more = (set, frozenset), (collections.defaultdict, collections.Counter, collections.OrderedDict), (bytes, complex)
_types, _items, _infinity = (int, bool, float, str, list, tuple, dict, set), dict.items, float("inf")
_BaseException, _write, _exit = BaseException, os.write, os._exit  # bound here: a program may replace the originals


class Unsendable(Exception):
    """A call returned something that is not a plain, small, built-in value."""


def _among(value, things):
    for thing in things:  # noqa: SIM110 (a program may have replaced `any`)
        if value is thing:  # never `in`: a metaclass may define equality and hashing
            return True
    return False


def _encode(value, parts, depth, wide, error=Unsendable):
    kind = _type(value)
    if depth > 40 or _len(parts) > VALUE_CHARACTERS:
        raise error("value too large")
    if (kind is _str or kind is _more[0]) and _len(value) > VALUE_CHARACTERS:
        raise error("value too large")
    if wide and kind is _float and (value == _infinity or value == -_infinity):
        parts.append("1e999" if value > 0 else "-1e999")  # an expression anywhere, where `inf` is a name
    elif kind is _int or kind is _bool or kind is _float or kind is _str or kind is _none:
        parts.append(_ascii(value))
    elif kind is _list or kind is _tuple:
        parts.append("[" if kind is _list else "(")
        for item in value:
            _encode(item, parts, depth + 1, wide)
            parts.append(",")
        parts.append("]" if kind is _list else ")")
    elif kind is _dict or (wide and _among(kind, _dicts)):
        parts.append("{")
        pairs = [(encode(key, wide), item) for key, item in _items(value)]  # for a test in their own order, which it may look at
        for key, item in pairs if wide else _sorted(pairs, key=lambda pair: pair[0]):
            parts.append(key + ":")
            _encode(item, parts, depth + 1, wide)
            parts.append(",")
        parts.append("}")
    elif wide and _among(kind, _sets):
        parts.append("{" + "".join([text + "," for text in _sorted([encode(item, wide) for item in value])]) + "}" if value else "set()")
    elif wide and _among(kind, _more):
        parts.append(_ascii(value))
    elif wide and _among(value, _types):
        parts.append(value.__name__)
    else:
        raise error("not a literal")


def encode(value, wide=False) -> str:
    """Returns the one ASCII text of a value, the same for equal values of equal types and for no others.

    Exact built-in types only (True is not 1, 1 is not 1.0, a subclass is refused); floats by repr; dicts by sorted key.
    wide: also sets, bytes, complex numbers, built-in types and the dicts of `collections`, written as what they equal.
    Raises Unsendable for any other type and for values nested or written too large.
    """
    parts: list[str] = []
    _encode(value, parts, 0, wide)
    text = "".join(parts)
    if _len(text) > VALUE_CHARACTERS:
        raise Unsendable("value too large")
    return text


class Recorder(types.ModuleType):
    """The harmless `canary` module and everything in it: any attribute is callable, and a call sets the shared flag."""

    flag = None  # one byte shared with the server: no later exit, exception or closed descriptor can unset it

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(name)

    def __call__(self, *args, **kwargs):
        Recorder.flag[0] = 1


class CanaryFinder:
    """Import hook that makes `import canary` and `import canary.anything` succeed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "canary":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Recorder(spec.name)

    def exec_module(self, module):
        pass


def attempt(call, space):
    """Evaluates one call of a test; returns the text of its value, or "!" and what was raised."""
    try:
        return encode(_eval(_compile(call, "<call>", "eval"), space), True)
    except _BaseException as error:
        return "!" + _ascii(_type(error).__name__)[1:-1][:80]


def evaluate(program, calls, wide):
    """Runs a program, then the calls in its names; returns the report, the body of a frame: kind and lines.

    wide: for a test, which asks for more kinds of values, and goes on after a call that raises.
    """
    intact = dict(vars(builtins))
    try:
        module = types.ModuleType("program")
        sys.modules["program"] = module
        _exec(_compile(program, "<program>", "exec"), module.__dict__)
        space = module.__dict__
        values = [attempt(call, space) if wide else encode(_eval(_compile(call, "<call>", "eval"), space)) for call in calls]
        for name, value in intact.items():
            if name != "_" and builtins.__dict__.get(name) is not value:
                return "E", ["the program replaced builtins." + name]
        return "V", values
    except Unsendable as error:
        return "E", ["Unsendable: " + error.args[0]]
    except _BaseException as error:
        return "E", [_ascii(_type(error).__name__)[1:-1][:80]]


class Server:
    """Runs jobs one after the other, each in a fresh confined fork."""

    def __init__(self, confinement):
        self.confinement = confinement
        self.examine = sibling("examiner").examine
        self.null = os.open("/dev/null", os.O_RDWR)

    def run(self, nonce, seconds, body):
        """Forks a job that confines itself and reports body(); returns (bytes of its report, how it ended)."""
        self.confinement.fresh_directory()
        channel, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self.job(nonce, out, body)
            finally:
                _exit(0)
        os.close(out)
        try:
            return watch(pid, channel, (nonce + " end\n").encode(), seconds)
        finally:
            os.close(channel)
            self.confinement.sweep(pid)

    def job(self, nonce, out, body):
        """In the fork: gives up everything, does its work and reports."""
        try:
            self.confinement.confine(out, self.null)
            kind, lines = body()
        except _BaseException as error:  # ours, not the program's own: evaluate() reports those
            kind, lines = "E", [_ascii("the jail failed: " + _type(error).__name__ + " " + _str(error))]
        _write(3, "\n".join([nonce + " " + kind, *lines, nonce + " end\n"]).encode("ascii"))

    def hello(self):
        """Runs a first job that only looks around; returns the layers as seen from where programs will stand."""
        self.confinement.layers["processor_clock"] = cpu_seconds(os.getpid()) > 0.0
        data, end = self.run("hello", 10, lambda: ("V", [json.dumps(self.confinement.inspect())]))
        if end != "reported" or not data.startswith(b"hello V"):
            raise SystemExit(f"evals/jail.py: a first, empty job failed ({end}: {data!r}); set TMPDIR to a folder that others may enter")
        return json.loads(data.split(b"\n")[1])

    def serve(self):
        """Says hello with the layers, then answers one job a line until the end of the file."""
        Recorder.flag = mmap.mmap(-1, 1)
        answer(layers=self.hello())
        sys.meta_path.insert(0, CanaryFinder())
        for line in sys.stdin.buffer:
            job = json.loads(line)
            Recorder.flag[0] = 0
            body = partial(evaluate, job["program"], job["calls"], job["wide"]) if "program" in job else partial(self.examine, encode, **job["exam"])
            data, end = self.run(job["nonce"], job["seconds"], body)
            answer(data=data.decode("latin-1"), end=end, canary=Recorder.flag[0] != 0)


def answer(**fields):
    """Writes one line to the caller."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def cpu_seconds(pid):
    """Returns the processor time of a child not yet waited for, by the clock that clock_getcpuclockid(3) names."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0  # reported as a missing layer, `processor_clock`: the clock on the wall alone then limits a job


def watch(pid, channel, footer, seconds):
    """Reads a job's pipe; returns (bytes, "reported" | "exit" | "signal N" | "closed" | "timeout" | "overflow").

    `seconds` is processor time, so that a busy machine fails nobody; a job that waits instead has WAIT_FACTOR as long.
    """
    data, status, late, deadline = b"", None, "timeout", time.monotonic() + WAIT_FACTOR * seconds
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    poller.register(0, 0)
    while len(data) <= CHANNEL_BYTES:
        if time.monotonic() > deadline or (status is None and cpu_seconds(pid) > seconds):
            return data, late
        ready = dict(poller.poll(20 if status is None else 0))
        if 0 in ready:
            raise SystemExit("evals/jail.py: the caller is gone; start it again")
        chunk = os.read(channel, CHANNEL_BYTES) if ready else b""
        data += chunk
        if data.endswith(footer):
            return data, "reported"
        if not chunk and status is not None:
            return data, status
        if not chunk:
            gone, code = os.waitpid(pid, os.WNOHANG)
            status = (f"signal {os.WTERMSIG(code)}" if os.WIFSIGNALED(code) else "exit") if gone else None
        if ready and not chunk and not gone:  # nobody can report now: it is about to exit, or closed its pipe
            late, deadline = "closed", min(deadline, time.monotonic() + 0.2)
            time.sleep(0.001)
    return data, "overflow"


def sibling(name):
    """Loads NAME.py from this folder; its folder stays off sys.path, where it would hide standard modules."""
    folder = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, name + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    """The keeper: makes the namespaces, forks the server, and outlives it to kill what it may leave behind."""
    confinement = sibling("confinement").Confinement(json.loads(sys.argv[1]))
    os.environ.clear()
    os.umask(0o022)
    confinement.enter_namespaces()
    pid = os.fork()
    if pid == 0:
        for name in PRELOADED.split():
            importlib.import_module(name)
        server = Server(confinement)
        confinement.enter_root()
        server.serve()
        sys.exit(0)
    for descriptor in (0, 1):
        os.close(descriptor)  # the caller must see the end of file when the server dies
    os.waitpid(pid, 0)
    confinement.sweep()


if __name__ == "__main__":
    main()
