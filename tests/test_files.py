"""Tasks from files: fields as published, splits by content, graders of each kind, and one sentence for what is missing."""

import gzip
import json
import os
import re
from decimal import Decimal
from pathlib import Path

import pytest

from distill import config
from distill.prune import run
from distill.rows import clean
from evals import capability
from evals.capability import grade, judge, nll, number_in
from evals.generate import token_logprobs
from evals.sandbox import Sandbox
from evals.tasks import TASKS, dropped, named
from evals.tasks.files import PASSAGE, called, opened, passages
from evals.tasks.task import SPLITS
from graphs.batches import encode
from graphs.host import load

ADD = {"task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """The sum."""\n', "entry_point": "add",
       "canonical_solution": "    return a + b\n",
       "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"}
CHECK = ADD | {"prompt": 'def check(a, b):\n    """The sum."""\n', "entry_point": "check"}
MBPP = {"task_id": 2, "text": "Write a function to find shared items.",
        "code": "def shared(a, b):\r\n  return tuple(set(a) & set(b))", "test_setup_code": "",
        "test_list": ["assert set(shared((3, 4), (4, 5))) == set((4,))", "assert shared((1,), (2,)) == ()"]}
GSM = {"question": "2 hens and 3 ducks?", "answer": "2 + 3 = <<2+3=5>>5 birds.\n#### 5"}
SVAMP = {"Body": "Tom had 9 hats.", "Question": "He lost 2. How many are left?", "Answer": 7.0}
TEXT = "once upon a time there was a small red fox who lived near the old bridge and liked to sing"
WORDS = TEXT.split()


def write(path, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def only(tmp_path, kind, *records, split="test"):
    """The rows of a file all of whose records belong to one split, and their task."""
    path = write(tmp_path / f"{kind}.jsonl", [record | {"split": split} for record in records])
    task = named(f"{kind}:{path}")[0]
    opened.cache_clear()
    return sorted(task.rows(split, 100), key=lambda row: row.index), task


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1) as made:
        yield made


def test_humaneval_and_mbpp_rows_are_graded_by_their_published_tests(tmp_path, sandbox):
    rows = [*only(tmp_path, "humaneval", ADD, CHECK)[0], *only(tmp_path, "mbpp", MBPP, ADD)[0]]
    wrong = ["    return a * b\n", "    return 3\n", "def shared(a, b):\n  return a", "    pass\n"]
    assert grade(rows, [row.completion for row in rows], sandbox).right == [True] * 4
    assert grade(rows, wrong, sandbox).right == [False] * 4
    assert rows[2].names == ("shared",) and "shared items" in rows[2].prompt and rows[0].names == ("add",)


def test_an_answer_ends_where_another_definition_begins(tmp_path, tiny_host, sandbox, monkeypatch):
    rows, task = only(tmp_path, "humaneval", ADD)
    monkeypatch.setattr(capability, "complete", lambda *_: ["    return a + b\n\ndef add(a, b):\n    return 0\n"])
    outcome = judge(tiny_host, task, rows, sandbox)
    assert outcome.right == [True] and outcome.completions == ["    return a + b\n"]


def test_worked_answers_are_graded_by_their_number(tmp_path, sandbox):
    (gsm,), (svamp,) = only(tmp_path, "gsm8k", GSM)[0], only(tmp_path, "svamp", SVAMP)[0]
    assert svamp.completion == " 7" and "He lost 2" in svamp.prompt
    written = [" so\n#### 5", "It is 5.", "#### 6", "5 or 6", "none", " 2 and then #### 5.00 birds 9"]
    assert grade([gsm] * 6, written, sandbox).right == [True, True, False, False, False, True]
    assert grade([svamp] * 3, ["7", " 7.0 hats", "-7"], sandbox).right == [True, True, False]
    assert number_in("is 1,234.50") == Decimal("1234.5") and number_in("a 3-4 b") == Decimal(-4) and number_in("no") is None


def test_a_users_rows_are_graded_by_answer_or_tests(tmp_path, sandbox):
    rows, _ = only(tmp_path, "jsonl", {"prompt": "Capital of France?", "answer": "Paris"},
                   {"prompt": "two lines", "answer": "a\nb"},
                   {"prompt": "", "tests": ["assert f(2) == 4", "assert f(3) == 9"]},
                   {"prompt": "", "tests": "assert f(1) == g(1)", "answer": "f = g = abs"})
    right = [" Paris \nmore", "\na \n b\nc", "def f(x): return x * x", "def f(x): return 2\ng = f"]
    assert grade(rows, right, sandbox).right == [True] * 4
    assert grade(rows, ["Paris.", "a\nc", "def f(x): return 4", "def f(x): return 2\ng = abs"], sandbox).right == [False] * 4
    assert called("import os\nfor x in range(3):\n    assert f(x, lambda y: y) == len(os.sep)") == ("f",)


def test_each_row_has_one_split_by_its_content_and_the_file_may_name_it(tmp_path):
    records = [GSM | {"question": f"{n} hens?"} for n in range(300)]
    one = opened("gsm8k", str(write(tmp_path / "a.jsonl", records)))
    other = opened("gsm8k", str(write(tmp_path / "b.jsonl.gz", [*records[::-2], {"question": "new", "answer": "1"}])))
    dealt = {split: {row.prompt for row in task_rows} for split, task_rows in one.splits.items()}
    assert sum(map(len, dealt.values())) == 300 == len(set().union(*dealt.values())) and 25 < len(dealt["test"]) < 75
    assert all({row.prompt for row in other.splits[split]} <= dealt[split] | {"Question: new\nAnswer:"} for split in SPLITS)
    said = ["trace", "train", "tune", "validation", "dev", "test"]
    splits = opened("gsm8k", str(write(tmp_path / "c.jsonl", [record | {"split": said[n % 6]} for n, record in enumerate(records)]))).splits
    assert len(splits["test"]) == 50 and len(splits["tune"]) >= 150 and len(splits["trace"]) >= 50 + 25
    assert one.rows("test", 9, seed=1) == one.rows("test", 5, seed=1) + one.rows("test", 4, seed=1, start=5) != one.rows("test", 9, seed=2)
    assert one.row("test", 3, 1) == one.rows("test", 9, seed=1)[3] and len(one.rows("test", 10**6)) == len(one.splits["test"])
    assert one.key != other.key and one.key.startswith("gsm8k:a@")


def test_text_is_cut_into_passages_with_one_foil_each(tmp_path, tiny_host):
    texts = [{"text": " ".join([*WORDS[n % 7:], f"number{n}."]) * 9} for n in range(60)]
    task = opened("text", str(write(tmp_path / "t.jsonl", texts)))
    rows = [row for split in SPLITS for row in task.splits[split]]
    assert all(len((row.prompt + row.completion).encode()) <= PASSAGE for row in rows) and len(rows) > 60
    for row in rows:
        first, foil = row.completion.split()[0], row.foil.split()[0]
        assert first != foil and row.foil.split()[1:] == row.completion.split()[1:] and row.completion[0] == " "
    owners = [set(re.findall(r"number\d+", " ".join(row.prompt + row.completion for row in task.splits[split]))) for split in SPLITS]
    assert all(owners) and not owners[0] & owners[1] and not owners[0] & owners[2]
    encoded = encode(tiny_host.tokenizer, [(rows[0].prompt, rows[0].completion)])[0]
    total, count = token_logprobs(tiny_host, [encoded])
    assert int(count) == len(encoded.ids) - encoded.prompt and nll(tiny_host, rows[:1])[0] != pytest.approx(float(-total / count), abs=1e-6)


def test_passages_lose_nothing_but_blanks():
    text = "A sentence. " * 100 + "x" * 1000 + "\n\nWhat é is? \"Yes.\" " + "word " * 200
    cut = list(passages(text))
    assert "".join("".join(cut).split()) == "".join(text.split()) and all(0 < len(part.encode()) <= PASSAGE for part in cut)
    assert cut[0].endswith("sentence.")


@pytest.mark.parametrize(
    "kind, line, said",
    [
        ("humaneval", json.dumps({key: ADD[key] for key in ADD if key != "test"}), "line 2: no field test; humaneval rows have task_id, prompt"),
        ("mbpp", json.dumps({"text": "x", "code": "y"}), "line 2: no field test_list"),
        ("gsm8k", json.dumps({"question": "x"}), "line 2: no field answer"),
        ("svamp", json.dumps({"Body": "x", "Answer": 1}), "line 2: no field Question"),
        ("jsonl", json.dumps({"prompt": "x"}), "line 2: no field answer or tests"),
        ("jsonl", json.dumps({"prompt": "x", "tests": "assert ("}), "line 2: not a jsonl row"),
        ("jsonl", json.dumps({"prompt": "x", "tests": "assert 1"}), "its tests call no function"),
        ("humaneval", json.dumps(ADD | {"test": "def check(:"}), "line 2: not a humaneval row"),
        ("text", json.dumps({"title": "x"}), "line 2: no field text"),
        ("text", json.dumps({"text": 5}), "line 2: not a text row"),
        ("gsm8k", "[1]", "line 2: not a JSON object"),
        ("gsm8k", "{", "line 2: not valid JSON"),
        ("gsm8k", json.dumps(GSM | {"split": "mine"}), "line 2: split 'mine' is none of"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_what_is_missing(tmp_path, kind, line, said):
    good = {"humaneval": ADD, "mbpp": MBPP, "gsm8k": GSM, "svamp": SVAMP, "jsonl": {"prompt": "x", "answer": "y"}, "text": {"text": " ".join(WORDS)}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good[kind]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=said) as error:
        named(f"{kind}:{path}")
    assert str(path) in str(error.value)


def test_files_that_are_not_there_or_hold_too_little_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        named(f"gsm8k:{tmp_path / 'none.jsonl'}")
    with pytest.raises(ValueError, match="name a file after it"):
        named("gsm8k:")
    (tmp_path / "bad.jsonl.gz").write_text("not gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        named(f"gsm8k:{tmp_path / 'bad.jsonl.gz'}")
    path = write(tmp_path / "few.jsonl", [GSM | {"split": "test"}])
    with pytest.raises(ValueError, match="named twice"):
        named(f"gsm8k:{path},gsm8k:{path}")
    task = named(f"gsm8k:{path}")[0]
    with pytest.raises(ValueError, match="none of its rows falls into the trace split"):
        clean(None, [task])
    with pytest.raises(ValueError, match="no slot"):
        task.row("test", 0, season="winter")
    unanswered = named(f"jsonl:{write(tmp_path / 'tests.jsonl', [{'prompt': '', 'tests': 'assert f(1)', 'split': 'trace'}])}")
    with pytest.raises(ValueError, match="no answer to learn from"):
        clean(None, unanswered)
    assert dropped([task]) == [] and [one.name for one in dropped([TASKS["coding"]])] == ["math", "stories"]


def test_a_model_is_pruned_for_a_corpus_of_the_users_own(tiny_model_folder, tmp_path):
    path = write(tmp_path / "corpus.jsonl", [{"text": " ".join([*WORDS[n % 9:], f"and {n}", *WORDS[: n % 11]])} for n in range(120)])
    run(config.Prune(model=str(tiny_model_folder), task=f"text:{path}", out=tmp_path / "run", features=16, fit_steps=4, joint_steps=2, gate_steps=2,
                     heal_tokens=1000, batch=8, tune_rows=8, prompts=8, keep=-1.0))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["dropped"] == [] and list(report["models"]["checkpoint"]["tasks"]) == ["text:corpus"]
    assert report["against"]["checkpoint"]["tasks"]["text:corpus"]["nll_difference"]["count"] == 8
    load(tmp_path / "run" / "checkpoint")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DISTILL_DATA"), reason="DISTILL_DATA names no folder with code/HumanEval.jsonl.gz")
def test_published_solutions_pass_their_own_tests_and_those_of_others_fail():
    task = opened("humaneval", str(Path(os.environ["DISTILL_DATA"]) / "code" / "HumanEval.jsonl.gz"))
    rows = [row for split in SPLITS for row in task.splits[split]]
    with Sandbox() as sandbox:
        assert sum(grade(rows, [row.completion for row in rows], sandbox).right) == len(rows) == 164
        assert not any(grade(rows, [row.completion for row in rows[1:] + rows[:1]], sandbox).right)
