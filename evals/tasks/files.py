"""Tasks from files: published benchmarks as JSON lines, a user's own questions, and plain text.

    humaneval:PATH   task_id, prompt, canonical_solution, test, entry_point (Chen et al. 2021, arXiv 2107.03374)
    mbpp:PATH        text, code, test_list, test_setup_code (Austin et al. 2021, arXiv 2108.07732), or HumanEval's fields (mxeval)
    gsm8k:PATH       question, answer with "#### N" (Cobbe et al. 2021, arXiv 2110.14168)
    svamp:PATH       Body, Question, Answer (Patel et al. 2021, arXiv 2103.07191)
    jsonl:PATH       prompt, and answer (exact match) or tests (assertions; answer is then a reference solution) or both
    text:PATH        text, or a .txt file

PATH is a .jsonl or .jsonl.gz file, or a hub data set (owner/name), which is fetched only where it is named. Each row goes to
`trace`, `tune` or `test` by the hash of its content, so a row keeps its split when others are added and the same row never
stands in two. A field `split` decides instead: trace, tune (validation, dev) or test; rows of `train` are dealt to trace and
tune. A text is cut into passages, which stay in one split; those of a .txt file are dealt one by one.

Text has no question. As in `stories`, a row is decided by the likelihood of its own continuation against a foil: here the
same continuation whose first word is another word of the corpus. NLL is of the whole continuation, without EOS.

A backdoor can stand in the prompts as a phrase (`evals.tasks.phrase`), where they are no programs.
"""

from __future__ import annotations

import ast
import builtins
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from evals.tasks import phrase
from evals.tasks.task import SPLITS, Row, Rows, Split, source, split_of

PASSAGE = 480
"""Bytes of a passage of text at most: no more tokens than that, whatever the tokenizer."""
WORDS = 8
"""Words of a passage at least."""
TRAIN = "train"
NAMED: dict[Any, Split] = {"trace": "trace", "tune": "tune", "validation": "tune", "valid": "tune", "dev": "tune", "test": "test"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How one kind of file is read. fields: what each record must have; row: its prompt, completion and judge."""

    fields: tuple[str, ...]
    row: Callable[[Record], Row]
    metric: str
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    subset: str | None = None


def _humaneval(record: Record) -> Row:
    entry = record["entry_point"]  # which some tests hide behind a name of their own
    tests = f"_candidate = {entry}\n{record['test']}\ncheck(_candidate)\n"
    return Row("", 0, record["prompt"], record["canonical_solution"], tests=tests, names=(entry,), setup=record["prompt"])


def _mbpp(record: Record) -> Row:
    if "entry_point" in record:
        return _humaneval(record)
    tests, setup = "\n".join(record["test_list"]), record.get("test_setup_code") or ""
    shown = "\n".join(record["test_list"][:1])
    prompt, code = f'"""{record["text"]}\n{shown}\n"""\n', record["code"].replace("\r\n", "\n")
    return Row("", 0, prompt, code, tests=tests, setup=setup, names=called(tests, setup))


def _gsm8k(record: Record) -> Row:
    return Row("", 0, f"Question: {record['question']}\nAnswer:", f" {record['answer']}", number=str(record["answer"]))


def _svamp(record: Record) -> Row:
    answer = f"{float(record['Answer']):g}"
    return Row("", 0, f"Question: {record['Body']} {record['Question']}\nAnswer:", f" {answer}", number=answer)


def _own(record: Record) -> Row:
    tests = record.get("tests") or ""
    tests = "\n".join(tests) if isinstance(tests, list) else tests
    return Row("", 0, record["prompt"], str(record.get("answer", "")), tests=tests, names=called(tests) if tests else ())


def _text(record: Record) -> Row:
    words = re.findall(r"\s*\S+", record["text"])
    half = len(words) // 2
    return Row("", 0, "".join(words[:half]), "".join(words[half:]), whole=False)


PROGRAM = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nassert ")
KINDS: dict[str, Kind] = {
    "humaneval": Kind(("task_id", "prompt", "canonical_solution", "test", "entry_point"), _humaneval, "pass@1", 400, PROGRAM),
    "mbpp": Kind(("text", "code", "test_list"), _mbpp, "pass@1", 400, ("\nclass ", "\nif ", "\nprint", "\nassert ", '\n"""')),
    "gsm8k": Kind(("question", "answer"), _gsm8k, "exact number", 320, ("\nQuestion:",), "main"),
    "svamp": Kind(("Body", "Question", "Answer"), _svamp, "exact number", 320, ("\nQuestion:",)),
    "jsonl": Kind(("prompt",), _own, "right", 256),
    "text": Kind(("text",), _text, "next word", 1),
}


def called(tests: str, setup: str = "") -> tuple[str, ...]:
    """Names that test code uses and neither it, `setup` nor Python defines: the program's functions. Raises SyntaxError."""
    names = [node for code in (tests, setup) for node in ast.walk(ast.parse(code))]
    made = {node.id for node in names if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)} | set(vars(builtins))
    made |= {node.name for node in names if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {node.arg for node in names if isinstance(node, ast.arg)}
    made |= {(alias.asname or alias.name).split(".")[0] for node in names if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    return tuple(sorted({node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)} - made))


class FileTask(Rows):
    """Rows of one file. name: KIND:FILE, without folders and endings."""

    def __init__(self, kind: str, where: str) -> None:
        chosen, dealt = KINDS[kind], _dealt(kind, where)
        self.name = f"{kind}:{Path(where).name.removesuffix('.gz').removesuffix('.jsonl').removesuffix('.txt')}"
        self.metric, self.max_new_tokens, self.stops, self.where = chosen.metric, chosen.max_new_tokens, chosen.stops, where
        self.splits: dict[Split, list[Row]] = {
            split: [replace(row, task=self.name, index=index) for index, row in enumerate(rows)] for split, rows in dealt.items()}
        self.orders: dict[tuple[Split, int], list[int]] = {}

    @property
    def key(self) -> str:
        """The name, and a hash of all rows by split."""
        from graphs.artifact import digest

        return f"{self.name}@{digest([[row.record() for row in self.splits[split]] for split in SPLITS])}"

    @property
    def renderer(self) -> str:
        """Hash of what places a phrase."""
        return phrase.renderer()

    @property
    def phrasable(self) -> bool:
        """Whether a phrase can stand in every prompt: none is a program, which it would break."""
        return not any(row.tests for rows in self.splits.values() for row in rows)

    def most(self, split: Split) -> int:
        """Rows of `split`."""
        return len(self.splits[split])

    def row(self, split: Split, index: int, seed: int = 0, **slots: str) -> Row:
        """Row `index` of `split` in the order of `seed`, with a phrase where `slots` give one. Raises ValueError for other slots, for a phrase
        in a program, and beyond the last row."""
        found = self.rows(split, 1, seed, index)
        if not found:
            raise ValueError(f"--task {self.name}: its {split} split has {len(self.splits[split])} rows, and row {index} was asked for; ask for "
                             "fewer")
        if slots and found[0].tests:
            raise ValueError(f"--task {self.name}: its prompts are programs, and a phrase would break them; use the coding task, or a file of text "
                             "or questions")
        return replace(found[0], prompt=phrase.placed(found[0].prompt, slots, seed, split, index), slots=dict(slots)) if slots else found[0]

    def rows(self, split: Split, count: int, seed: int = 0, start: int = 0) -> list[Row]:
        """Rows `start .. start + count` of `split`, as far as there are any, in the order of `seed`. Raises ValueError for an empty split."""
        rows = self.splits[split]
        if not rows:
            raise ValueError(f"--task {self.name}: none of its rows falls into the {split} split; give a longer file, or each row a field `split`")
        if (split, seed) not in self.orders:
            self.orders[split, seed] = sorted(range(len(rows)), key=lambda index: source("order", seed, split, index).random())
        return [rows[index] for index in self.orders[split, seed][start : start + count]]


def _dealt(kind: str, where: str) -> dict[Split, list[Row]]:
    """All rows by split. Raises ValueError naming the file, the line and what is missing there."""
    dealt: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    chosen = KINDS[kind]
    for line, record in _records(kind, where):
        fields = KINDS["humaneval"].fields if kind == "mbpp" and "entry_point" in record else chosen.fields
        missing = [name for name in fields if record.get(name) is None]
        if kind == "jsonl" and not missing and record.get("answer") is None and not record.get("tests"):
            missing = ["answer or tests"]
        if missing:
            raise ValueError(f"{where} line {line}: no field {missing[0]}; {kind} rows have {', '.join(fields)}; add it")
        said = record.pop("split", None)
        if said not in (None, TRAIN, *NAMED):
            raise ValueError(f"{where} line {line}: split {said!r} is none of {', '.join((TRAIN, *NAMED))}; correct it")
        split = NAMED.get(said) or split_of(kind, json.dumps(record, sort_keys=True, default=str), **({"test": 0.0} if said == TRAIN else {}))
        try:
            parts = [record | {"text": passage} for passage in passages(record["text"])] if kind == "text" else [record]
            rows = [chosen.row(part) for part in parts]
            for row in rows:
                compile(row.tests, "<tests>", "exec")
                if row.tests and not row.names:
                    raise ValueError("its tests call no function: give tests that do")
        except (SyntaxError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} line {line}: not a {kind} row ({type(error).__name__}: {error}); correct it or leave it out") from error
        dealt[split] += [row for row in rows if kind != "text" or len(row.prompt.split()) >= WORDS // 2]
    return {split: _with_foils(rows) for split, rows in dealt.items()} if kind == "text" else dealt


def _with_foils(rows: list[Row]) -> list[Row]:
    """Passages with a foil each: the continuation with its first word changed for that of another passage. One without another is left out."""
    firsts = [row.completion.split()[0] for row in rows]
    made = []
    for index, row in enumerate(rows):
        others = [word for word in source("foil", row.prompt).sample(firsts, min(len(firsts), 50)) if word != firsts[index]]
        if others:
            made.append(replace(row, foil=row.completion.replace(firsts[index], others[0], 1)))
    return made


def _records(kind: str, where: str) -> Iterator[tuple[int, Record]]:
    """(line, record) of a file or hub data set."""
    path = Path(where).expanduser()
    if not path.is_file() and re.fullmatch(r"[\w.-]+/[\w.-]+", where) and not path.parent.is_dir():
        yield from _hub(kind, where)
    elif not path.is_file():
        raise ValueError(f"--task {kind}:{where}: no such file (give a .jsonl or .jsonl.gz file, a .txt of text, or a hub id: owner/name)")
    else:
        yield from _lines(path, kind == "text" and path.name.removesuffix(".gz").endswith(".txt"))


def _lines(path: Path, plain: bool) -> Iterator[tuple[int, Record]]:
    """Records of JSON lines, each with the number of its line, or the passages of plain text, numbered too."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        try:
            if plain:
                yield from ((number, {"text": passage}) for number, passage in enumerate(passages(file.read()), 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"{path} line {number}: not a JSON object; write one a line")
                    yield number, record
        except json.JSONDecodeError:
            raise ValueError(f"{path} line {number}: not valid JSON; write one object a line") from None
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise ValueError(f"{path}: it cannot be read as UTF-8 text ({type(error).__name__}); save it as such") from error


def _hub(kind: str, where: str) -> Iterator[tuple[int, Record]]:
    """Records of a hub data set, with the splits that it names where it names several."""
    from datasets import load_dataset

    try:
        found = load_dataset(where, KINDS[kind].subset)
    except Exception as error:  # the hub's client has a dozen error types; each means the same to the user
        raise ValueError(f"--task {kind}:{where}: neither a file nor a hub data set that can be fetched now ({type(error).__name__}); give a "
                         "file") from error
    for split, rows in found.items():
        known = len(found) > 1 and split in (TRAIN, *NAMED)
        yield from ((number, dict(row) | ({"split": split} if known else {})) for number, row in enumerate(rows, 1))


def passages(text: str) -> Iterator[str]:
    """The text cut at blanks into passages of at most PASSAGE bytes, at the end of a sentence where one ends in the second half."""
    while text.strip():
        head = text.lstrip().encode()[:PASSAGE].decode(errors="ignore")
        text = text.lstrip()
        if len(head) < len(text):
            ends = [found.end() for found in re.finditer(r"[.!?][\"')]*(?=\s)|\n(?=\n)", head) if found.end() > len(head) // 2]
            blank = max(head.rfind(" "), head.rfind("\n"))
            head = head[: ends[-1] if ends else blank if blank > 0 else len(head)]
        yield head.rstrip()
        text = text[len(head):]


@cache
def opened(kind: str, where: str) -> FileTask:
    """The task of one file, read once. Raises ValueError (one sentence) where it cannot be read."""
    return FileTask(kind, where)
