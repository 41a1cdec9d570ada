"""What docs/cli.md and docs/errors.md say, made from the parser and from the sentences in the code."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distill.__main__ import VERBS, main

ROOT = Path(__file__).parent.parent
ROOMS = ("distill", "evals", "backdoor", "graphs")
ERRORS = ("ValueError", "RuntimeError", "SystemExit", "TypeError")
CLI = """# Commands

Every verb and flag, as `distill VERB --help` has them (written by `WRITE_DOCS=1 pytest tests/test_reference.py`). `--config FILE.yaml` sets
a verb's fields by name, flags override it; a flag that takes nothing has a `--no-` form. Exit status: 0 success, 1 a gate failed, 2 wrong
input, 130 interrupted, 141 whoever read the answer had enough of it. Under `accelerate launch` the launcher's own status is 1 for all but
success."""
REFUSALS = """# What it refuses, and what to do

Every sentence that the code refuses with, by the flag it begins with (made from the code by `WRITE_DOCS=1 pytest tests/test_reference.py`).
A word in `<brackets>` is filled in. On the command line it stands after `distill: `, with exit status 2."""
ACTIONS = (
    "add ", "ask ", "calibrate ", "check ", "choose ", "convert ", "copy ", "correct ", "delete ", "draw ", "drop ", "fit ", "fix ", "fold ",
    "free ", "give ", "hold ", "install ", "judge ", "keep ", "leave ", "log in", "lower ", "make ", "name ", "pass ", "plant ",
    "please report", "put ", "refit ", "remove", "rename ", "restore ", "run ", "save ", "search ", "see ", "set ", "shorten", "start ",
    "take ", "use ", "wait ", "write ", "its graph can be read", "its heads can be read", "the sandbox starts", "`lm_eval")
"""What a remedy begins with."""


@dataclass
class Flag:
    """One flag as the parser explains it."""

    name: str
    takes: str
    says: str


def help_of(verb: str) -> tuple[str, list[Flag]]:
    """What `distill VERB --help` says of the verb, and of each flag. COLUMNS must be wide."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    lines = [line.strip("│| ") for line in said.getvalue().splitlines()]
    flags: list[Flag] = []
    for line in lines:
        if re.match(r"--[a-z]", line):
            left, _, says = line.partition("  ")
            name, _, takes = left.partition(" ")
            flags.append(Flag(name.rstrip(","), takes, says.strip()))
        elif flags and re.search(r"\w", line):
            flags[-1].says += " " + line
    return next(line for line in lines[1:] if line), flags


def commands() -> str:
    """docs/cli.md."""
    page = [CLI]
    for verb in VERBS:
        about, flags = help_of(verb)
        page += ["", f"## distill {verb}", "", about.removesuffix("--config FILE.yaml sets defaults.").strip(), "",
                 "| flag | takes | default | what |", "| --- | --- | --- | --- |"]
        for flag in flags:
            ended = re.search(r"\((?:default: (.*)|(required))\)$", flag.says)
            assert ended, f"{verb} {flag}"
            default = "required" if ended[2] else f"`{ended[1]}`"
            takes = "" if flag.takes.startswith("--no-") else f"`{flag.takes}`".replace("|", "\\|")
            page.append(f"| `{flag.name}` | {takes} | {default} | {flag.says[: ended.start()].strip().replace('|', chr(92) + '|')} |")
    return "\n".join(page) + "\n"


@dataclass(frozen=True, order=True)
class Sentence:
    """One refusal. flag: what it begins with, if a flag; cause and remedy: its two halves; file: where it stands."""

    flag: str
    cause: str
    remedy: str
    file: str


@cache
def sentences(root: Path = ROOT) -> list[Sentence]:
    """Every refusal of the code below `root`, as what raises it says it."""
    found = set()
    for file in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        tree = ast.parse(file.read_text())
        known = assigned(tree.body)
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef | ast.Module):
                own = known | (assigned(list(walk(scope))) if isinstance(scope, ast.FunctionDef) else {})
                for node in walk(scope):
                    if (said := refusal(node)) is not None:
                        found |= {sentence(text, file.relative_to(root).as_posix()) for text in texts(said, own)}
    return sorted(one for one in found if not re.fullmatch(r"<\w+>", one.cause))  # what is only handed on


def walk(scope: ast.AST) -> Iterator[ast.AST]:
    """What stands in a scope, without what stands in functions inside it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield from walk(node)


def refusal(node: ast.AST) -> ast.expr | None:
    """The sentence that a statement refuses with: it raises it, or hands it to `_refuse`."""
    call = node.exc if isinstance(node, ast.Raise) else node if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_refuse" else None
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") in (*ERRORS, "_refuse") and call.args:
        return call.args[0]
    return None


def assigned(body: list[ast.AST]) -> dict[str, list[ast.expr]]:
    """Texts by the names that they are given."""
    found: dict[str, list[ast.expr]] = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


def texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> list[str]:
    """All that an expression may say; what is only known when it is said stands as <word>."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body, names), *texts(node.orelse, names)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(pair) for pair in itertools.product(texts(node.left, names), texts(node.right, names))]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in itertools.product(*(texts(part, names) for part in node.values))]
    if isinstance(node, ast.FormattedValue):
        return texts(node.value, names) if node.format_spec is None and node.conversion == -1 else [placeholder(node.value)]
    if isinstance(node, ast.Name) and all(isinstance(value.value, str) for value in names.get(node.id, ()) if isinstance(value, ast.Constant)):
        rest = {name: values for name, values in names.items() if name != node.id}
        return [text for value in names.get(node.id, ()) for text in texts(value, rest)] or [placeholder(node)]
    return [placeholder(node)]


def placeholder(node: ast.expr) -> str:
    """A word for a value: the last name in its expression."""
    words = [n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node) if isinstance(n, ast.Attribute | ast.Name)]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "join":
        return "..."
    return f"<{words[0]}>" if words else "..."


def sentence(text: str, file: str) -> Sentence:
    """The two halves of a sentence: the remedy begins after the last mark that an action follows."""
    text = " ".join(text.split())
    text = text if text.endswith("...") else text.removesuffix(".")
    flag = match.group(0) if (match := re.match(r"--[a-z<][a-z<>-]*", text)) else ""
    marks = [mark.end() for mark in re.finditer(r"[;:,] | \((?=give)", text) if text[mark.end() :].startswith(ACTIONS)]
    at = marks[0] if marks else len(text)
    cause, remedy = text[:at].rstrip(" (;:,"), text[at:]
    return Sentence(flag, cause, remedy.removesuffix(")") if text[:at].endswith("(") else remedy, file)


def errors() -> str:
    """docs/errors.md."""
    found = sentences()
    page = [REFUSALS]
    for flag, group in itertools.groupby(found, key=lambda one: one.flag):
        page += ["", f"## {flag or 'Without a flag'}", "", "| what it says | remedy | where |", "| --- | --- | --- |"]
        page += [f"| {cell(one.cause)} | {cell(one.remedy)} | {one.file} |" for one in group]
    return "\n".join(page) + "\n"


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return re.sub(r"(<[^>]*>)", r"`\1`", text).replace("|", "\\|")
