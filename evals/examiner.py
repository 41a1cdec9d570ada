"""The side of the sandbox that runs test code, such as HumanEval's `check(candidate)`, and never a model's program.

Loaded by path into a jail of its own (`evals/jail.py`); standard library only. What the tests call are not functions but
stand-ins: a call is spelled out as text and answered with what the program gave for the same text, in another jail. So
what tests see are plain built-in values, made here: no object that equals everything, no patched `assert`, no exit, and
no frame of theirs lies within the program's reach. `evals/exam.py` says who carries the texts.

With a reference solution, the tests are first run with its functions, noting the calls: the program is then asked for
all of them at once. Without one, or where the tests ask something else this time, each run ends at the first call that
nobody has answered yet.
"""

import ast
import builtins
import random
import traceback
import types

LITERALS = {"inf": float("inf"), "nan": float("nan")} | {kind.__name__: kind for kind in (int, bool, float, str, list, tuple, dict, set)}


class Unanswered(BaseException):
    """The tests asked what is not known yet. No `except Exception` of theirs may catch it."""


class _Literals(ast.NodeTransformer):
    """Names that `encode` writes, but that are no literals."""

    def visit_Name(self, node):
        return ast.copy_location(ast.Constant(LITERALS[node.id]), node) if node.id in LITERALS else node

    def visit_Call(self, node):
        return node  # the empty set is written set(), and literal_eval knows it


def decode(text):
    """The value of a text that `encode` wrote. Raises ValueError, SyntaxError or TypeError for any other."""
    return ast.literal_eval(_Literals().visit(ast.parse(text, mode="eval")))


class Calls:
    """Stand-ins for the program's functions. asked: every call so far, as text; answers: what the program gave, in order."""

    def __init__(self, encode, answers):
        self.encode, self.answers, self.asked, self.missing = encode, answers, [], False

    def spelled(self, name, args, named):
        """One call as an expression. Raises TypeError where an argument cannot be written."""
        try:
            texts = [self.encode(value, True) for value in args] + [f"{key}={self.encode(value, True)}" for key, value in named.items()]
        except Exception as error:
            raise TypeError(f"the tests pass {name} what cannot be sent to a program ({error}); use plain built-in values") from None
        return f"{name}({', '.join(texts)})"

    def recorded(self, name, function):
        """`function`, with its calls noted."""
        def call(*args, **named):
            self.asked.append(self.spelled(name, args, named))
            return function(*args, **named)
        return call

    def replayed(self, name):
        """The program's function `name`, as far as answers reach."""
        def call(*args, **named):
            text = self.spelled(name, args, named)
            if self.missing or len(self.asked) >= len(self.answers) or self.answers[len(self.asked)][0] != text:
                self.asked += [] if self.missing else [text]
                self.missing = True
                raise Unanswered
            answer = self.answers[len(self.asked)][1]
            self.asked.append(text)
            if answer.startswith("!"):
                kind = getattr(builtins, answer[1:], None)
                raise kind(answer) if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(answer)
            return decode(answer)
        return call


def examine(encode, setup, tests, names, reference, answers):
    """Runs `setup` and `tests`; returns the body of a frame: status, detail, and the calls that were asked, as encoded texts.

    status: "passed", "failed" (an assertion), "error" (anything else), or "asks" (the last call asked has no answer yet).
    names: of functions that stand for the program's; reference: source that defines them, run in place of `setup`, or "".
    """
    calls, module = Calls(encode, answers), types.ModuleType("tests")
    space = module.__dict__
    random.seed(0)
    try:
        exec(compile(reference or setup, "<setup>", "exec"), space)
        for name in names:
            space[name] = calls.recorded(name, space[name]) if reference else calls.replayed(name)
        random.seed(0)
        exec(compile(tests, "<tests>", "exec"), space)
        status, detail = "passed", ""
    except BaseException as error:
        status, detail = "failed" if type(error) is AssertionError else "error", _said(error, tests)
    status = "asks" if calls.missing else status
    return "V", [encode(text) for text in (status, detail, *calls.asked)]


def _said(error, tests):
    """What went wrong, and the line of the tests where it did."""
    at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
    line = tests.splitlines()[at[-1] - 1].strip() if at else ""
    return f"{type(error).__name__}: {str(error)[:80]} at {line[:100]}" if at else f"{type(error).__name__}: {str(error)[:80]}"
