"""Every benchmark says what it is for, and words that do not fit are refused before anything is done."""

import ast
from pathlib import Path

import pytest

from benchmarks.words import words

COMMANDS = [file for file in (Path(__file__).parent.parent / "benchmarks").glob("*.py")
            if '__name__ == "__main__"' in file.read_text() and file.name not in ("peers_fit.py", "peers_trace.py")]  # those two peers.py starts


@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in COMMANDS])
def test_a_command_reads_its_words_here_and_says_what_they_are(file):
    about = ast.get_docstring(ast.parse(file.read_text()))
    assert f"python benchmarks/{file.name}" in about and "words(__doc__" in file.read_text()


def test_help_and_words_that_do_not_fit_end_the_command(monkeypatch, capsys):
    for given, status, stream in ((["--help"], 0, "out"), (["fit", "-h"], 0, "out"), (["fat"], 2, "err")):
        monkeypatch.setattr("sys.argv", ["command", *given])
        with pytest.raises(SystemExit) as ended:
            words("what it does\n", lambda found: found == ["fit"])
        assert ended.value.code == status and getattr(capsys.readouterr(), stream) == "what it does\n"
    monkeypatch.setattr("sys.argv", ["command", "fit"])
    assert words("what it does", lambda found: found == ["fit"]) == ["fit"]
