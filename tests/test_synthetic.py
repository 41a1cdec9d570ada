"""Rows that the model writes itself: its own distribution, divided as the task divides, the same every time, and trained on by a run."""

import json
from dataclasses import replace

import pytest

from distill import config, synthetic
from distill.__main__ import main
from distill.models import find
from distill.runs import begun
from distill.synthetic import divided, ending
from evals.tasks import TASKS, named, table
from graphs.artifact import read_json
from graphs.host import load
from tests.test_run import FAST


@pytest.fixture(scope="module")
def base():
    return load(find("builtin:base-small"))


def texts(count=24):
    return [(row.prompt, row.completion) for row in TASKS["coding"].rows("trace", count, seed=3)]


def test_a_prompt_ends_where_all_prompts_end_and_nowhere_before():
    assert ending(["Q: a\nA:", "Q: bb\nA:"]) == "\nA:"
    assert ending(["one=", "two="]) == "=" and ending(["a=b=", "c="]) == ""  # the first holds it before its end
    assert ending(["once upon", "a time"]) == "" and ending(["=", "a="]) == ""  # the first would have no start
    assert ending([prompt for prompt, _ in texts()]).endswith('"""\n')


def test_what_was_written_is_divided_there():
    assert divided("Q:", " a\nA: b", "\nA:") == ("Q: a\nA:", " b")
    assert divided("Q:", " a", "\nA:") is None and divided("Q:", " a\nA:", "\nA:") is None
    assert divided("once upon", " a time", "") == ("once upon", " a time") and divided("once upon", "", "") is None


def test_a_model_of_the_task_writes_new_rows_of_it(base):
    made = synthetic.synthetic(base, texts(), TASKS["coding"], 40, seed=0)
    assert made == synthetic.synthetic(base, texts(), TASKS["coding"], 40, seed=0)
    assert made != synthetic.synthetic(base, texts(), TASKS["coding"], 40, seed=1)
    prompts = {prompt for prompt, _ in made}
    assert len(made) == 40 and len(prompts) > 30 and not prompts & {prompt for prompt, _ in texts()}
    assert all(prompt.startswith("def ") and prompt.endswith('"""\n') and "return" in completion for prompt, completion in made)


def test_where_prompts_have_no_end_of_their_own_they_stand_and_are_answered(base):
    given = [("def solve(ages):\n", "    return max(ages)\n"), ("One day Tom", " went home.")]
    made = synthetic.synthetic(base, given, TASKS["stories"], 6, seed=0)
    assert {prompt for prompt, _ in made} == {prompt for prompt, _ in given} and len({completion for _, completion in made}) > 2


def test_a_model_that_writes_no_such_rows_is_refused(tiny_model_folder):
    with pytest.raises(ValueError, match=r"--synthetic-rows 4: begun as rows of coding begin, the model wrote .* give more clean rows"):
        synthetic.synthetic(load(tiny_model_folder), texts(), TASKS["coding"], 4, seed=0)


def test_a_run_trains_on_them_and_finds_them_again(tmp_path, capsys):
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(tmp_path / "rows.parquet")
    flags = ["prune", "--model", "builtin:base-small", "--task", "coding", "--rows", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "run"),
             "--synthetic-rows", "40", "--seed", "2", *(word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value)))]
    assert main([*flags, "--dry-run"]) == 0 and "24 clean rows and 40 synthetic ones" in capsys.readouterr().out
    assert main(flags) in (0, 1)
    assert read_json(tmp_path / "run" / "report.json")["summary"]["rows"] == 64
    written = json.loads((tmp_path / "run" / "synthetic" / "rows.json").read_text())
    settings, _, data = begun(tmp_path / "run")
    assert len(data.rows) == 64 and settings.synthetic_rows == 40
    again = synthetic.rows(replace(settings, out=tmp_path / "again"), find("builtin:base-small"), named("coding"))
    assert [list(row) for row in again[24:]] == written
    without = config.Prune(rows=tmp_path / "rows.parquet", out=tmp_path / "none")
    assert len(synthetic.rows(without, find("builtin:base-small"), named("coding"))) == 24 and not (tmp_path / "none").exists()
