"""docs/cli.md is what the parser says, docs/errors.md what the code refuses with; WRITE_DOCS=1 writes them anew."""

import os

from tests.reference import ROOT, commands, errors, sentences


def is_page(name: str, wanted: str) -> None:
    page = ROOT / "docs" / name
    if os.environ.get("WRITE_DOCS"):
        page.write_text(wanted)
    assert page.read_text() == wanted, "run WRITE_DOCS=1 pytest tests/test_reference.py"


def test_the_command_line_reference_is_what_help_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    is_page("cli.md", commands())


def test_the_index_of_errors_is_what_the_code_says():
    is_page("errors.md", errors())


def test_every_refusal_names_a_remedy():
    assert len(sentences()) > 200
    assert not [one for one in sentences() if not one.remedy]


def test_sentences_are_found_wherever_they_are_raised(tmp_path):
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "one.py").write_text('''
REMEDY = "give another"
def first(folder, count):
    reason = "it is empty"
    if count:
        reason = "it is full"
    raise ValueError(f"--out {folder}: {reason}; {REMEDY}")
def second(x):
    def inner():
        raise RuntimeError(f"too many ({x.count:.2f} of {', '.join(x.names)}): "
                           "use fewer.")
    raise ValueError("bad" if x else "worse: leave it out")
def third(error):
    raise ValueError(str(error)) from error
''')
    found = {(one.flag, one.cause, one.remedy) for one in sentences(tmp_path)}
    assert found == {("--out", "--out <folder>: it is empty", "give another"), ("--out", "--out <folder>: it is full", "give another"),
                     ("", "too many (<count> of ...)", "use fewer"), ("", "bad", ""), ("", "worse", "leave it out")}
