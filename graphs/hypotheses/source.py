"""Source: hypotheses as Python functions, and the definitions that these use, copied from where they are defined.

A hypothesis is data, and so is what is written here: numbers, names of registered views and relations, and token texts as literals. What the
functions call is copied out of the modules themselves, without annotations and without the decorators of the registries, so that a program
computes with the very code that hypotheses were tested with.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from graphs.graph import Index
from graphs.hypotheses.hypothesis import Head, Look, Rule, Sum, Tables
from graphs.hypotheses.verdict import Judged
from graphs.hypotheses.views import RELATIONS, VIEWS

WIDE = 140
"""Characters of a line, where there is a choice."""


def identifier(name: str) -> str:
    """A node's name as Python takes it: L1_H2_C3."""
    return name.replace(".", "_")


def number(value: float) -> str:
    """The fewest digits that are the same number in single precision."""
    return str(np.float32(value))


def lines(parts: Sequence[str], indent: int, apart: str = ", ") -> list[str]:
    """Parts joined into lines of `WIDE` characters."""
    found, now = [], ""
    for at, part in enumerate(parts):
        whole = part + (apart if at < len(parts) - 1 else "")
        if now and indent + len(now + whole.rstrip()) > WIDE:
            found.append(" " * indent + now.rstrip())
            now = ""
        now += whole
    return [*found, " " * indent + now.rstrip()] if now else found


def parent(nodes: Index, name: str) -> str:
    """The activation of an equation's parent, as an expression."""
    found = nodes.find(name)
    block = nodes.block(found)
    return token(nodes, found - block.start) if block.kind == "token" else identifier(name)


def token(nodes: Index, which: int) -> str:
    """Whether a token stands somewhere, as an expression: by its text where that says which."""
    text = nodes.tokens[which]
    return f"is_token(ids, {text!r})" if nodes.tokens.index(text) == which else f"is_token(ids, {which})"


def function(one: Judged) -> str:
    """What a hypothesis' function is called: table_L2_F117, look_L1_H3, head_L1_H2, equation_L2_F5."""
    return f"{one.hypothesis.kind}_{identifier(one.hypothesis.target)}"


def comment(text: str) -> list[str]:
    """Text as lines of a comment, whatever characters are in it."""
    return textwrap.wrap(repr(text)[1:-1], WIDE, initial_indent="# ", subsequent_indent="# ")


def definition(one: Judged, nodes: Index) -> str:
    """The function of a hypothesis, its evidence above it."""
    rule, held = one.hypothesis.rule, one.evidence
    shuffled = "" if held.null is None else f"; shuffled {held.null.value:.2f}"
    about = comment(f"{one.hypothesis.line()}. Recovers {held.recovered.value:.2f} [{held.recovered.low:.2f}, {held.recovered.high:.2f}] of the "
                    f"{held.ablated:.1e} nats a token that ablating it costs{shuffled}.")
    return "\n".join([*about, f"def {call(one, nodes)}:", *(_equation(rule, nodes) if isinstance(rule, Sum) else _body(rule))])


def call(one: Judged, nodes: Index) -> str:
    """The hypothesis' function and what it takes: the token texts, or, of an equation, the ids and its parents' activations."""
    rule = one.hypothesis.rule
    takes = ["ids", *(parent(nodes, name) for name in rule.terms if not name.startswith("token "))] if isinstance(rule, Sum) else ["texts"]
    return f"{function(one)}({', '.join(takes)})"


def _equation(rule: Sum, nodes: Index) -> list[str]:
    terms = [f"{number(weight)}*{parent(nodes, name)}" for name, weight in rule.terms.items()]
    return ["    return relu(", *lines([*terms, number(rule.constant)], 8, " + "), "    )"]


def _body(rule: Rule) -> list[str]:
    match rule:
        case Tables():
            return _said("    return ", _tables(rule))
        case Look():
            return _said("    return ", _look(rule))
        case Head():
            return [*_said("    where = ", _look(rule.look)), *_said("    return where @ ", _tables(rule.values))]
    raise TypeError(f"{type(rule).__name__} has no body without a run; give it one")


def _said(before: str, expression: list[str]) -> list[str]:
    return [before + expression[0], *expression[1:]]


def _tables(rule: Tables) -> list[str]:
    """A call of `first_known`. Largest values first."""
    single = len(rule.otherwise) == 1
    found = ["first_known(texts,"]
    for table in rule.tables:
        ordered = sorted(table.values.items(), key=lambda pair: -max(abs(value) for value in pair[1]))
        entries = [f"{key!r}: {_value(value, single)}" for key, value in ordered]
        found += [f"        ({VIEWS[table.view].__name__}, {{", *lines(entries, 12), "        }),"]
    return [*found, f"        otherwise={_value(rule.otherwise, single)})"]


def _value(value: Sequence[float], single: bool) -> str:
    return number(value[0]) if single else "(" + ", ".join(map(number, value)) + ("," if len(value) == 1 else "") + ")"


def _look(rule: Look) -> list[str]:
    """A call of `looking`. Largest weights first."""
    weights = sorted(((name, weight) for name, weight in rule.relations.items() if weight), key=lambda pair: -abs(pair[1]))
    found = ["looking(texts,", "        {", *lines([f"{RELATIONS[name].__name__}: {number(weight)}" for name, weight in weights], 12), "        }"]
    if rule.distance:
        found[-1] += ","
        found += ["        distance=(", *lines([f"{number(value)}," for value in rule.distance], 12, " "), "        )"]
    if rule.pairs:
        ordered = sorted(rule.pairs.items(), key=lambda pair: -abs(pair[1]))
        views = (f"{side}={VIEWS[name].__name__}" for side, name in (("asks", rule.asks), ("answers", rule.answers)) if name)
        found[-1] += ","
        found += [f"        {', '.join([*views, 'pairs={'])}",
                  *lines([f"{key!r}: {number(value)}" for key, value in ordered], 12), "        }"]
    return [*found[:-1], found[-1] + ")"]


def copied(modules: Sequence[ModuleType], text: str) -> tuple[str, str]:
    """Imports, and the definitions that `text` uses by name with all that these use, in the order of the modules."""
    imports: dict[str, str] = {}
    defined: dict[str, ast.stmt] = {}
    said: dict[ast.stmt, str] = {}
    for module in modules:
        source = inspect.getsource(module)
        for made in ast.parse(source).body:
            if isinstance(made, ast.Import | ast.ImportFrom):
                imports |= {alias.asname or alias.name: ast.unparse(_one(made, alias)) for alias in made.names}
            elif names := _names(made):
                said[made] = _plain(source, made)
                defined |= dict.fromkeys(names, made)
    needed: set[str] = set()
    ahead = _used(text)
    while ahead:
        needed |= ahead
        ahead = {name for found in ahead & set(defined) for name in _used(said[defined[found]])} - needed
    head = sorted((line for name, line in imports.items() if name in needed), key=lambda line: (line.startswith("from"), line))
    chosen = [made for made in said if needed & set(_names(made))]
    return "\n".join(head), "".join(("\n" if isinstance(made, ast.Assign | ast.AnnAssign) else "\n\n\n") + said[made] for made in chosen)


def _used(text: str) -> set[str]:
    return {one.id for one in ast.walk(ast.parse(text)) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}


def _one(made: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    return ast.Import([alias]) if isinstance(made, ast.Import) else ast.ImportFrom(made.module, [alias], 0)


def _names(made: ast.stmt) -> list[str]:
    """What a top-level statement defines."""
    if isinstance(made, ast.FunctionDef | ast.ClassDef):
        return [made.name]
    targets = made.targets if isinstance(made, ast.Assign) else [made.target] if isinstance(made, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _plain(source: str, made: ast.stmt) -> str:
    """A definition as it is written, without the registry's decorator and without annotations, of which only a class's fields need theirs."""
    found = source.encode().split(b"\n")
    for inner in sorted((one for one in ast.walk(made) if isinstance(one, ast.FunctionDef)), key=lambda one: -one.lineno):
        if (back := inner.returns) is not None:
            line = found[back.lineno - 1]
            found[back.lineno - 1] = line[: line.rindex(b" -> ", 0, back.col_offset)] + line[back.end_col_offset :]
        takes = [*inner.args.args, *inner.args.kwonlyargs, *filter(None, (inner.args.vararg, inner.args.kwarg))]
        for one in sorted(takes, key=lambda one: (-one.lineno, -one.col_offset)):
            line, end = found[one.lineno - 1], one.col_offset + len(one.arg.encode())
            found[one.lineno - 1] = line[:end] + line[one.end_col_offset :].replace(b" = ", b"=", line[one.end_col_offset :].startswith(b" = "))
    start = made.lineno if isinstance(made, ast.FunctionDef) else min([made.lineno, *(one.lineno for one in getattr(made, "decorator_list", []))])
    return b"\n".join(found[start - 1 : made.end_lineno]).decode()
