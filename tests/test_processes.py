"""Several processes: dealt-out work comes together in order, the main one decides for all, and one process is left as it is."""

import os
import subprocess
import sys
import time

import pytest

from graphs import processes
from tests.launched import two


def test_one_process_does_everything_and_loads_nothing(monkeypatch):
    for name in (*processes.SIZES, *processes.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "state", lambda: pytest.fail("one process met others"))
    assert not processes.several() and processes.main() and processes.turn(3)
    assert processes.dealt([1, 2, 3], lambda x: x * x) == [1, 4, 9] and processes.agreed(lambda: "me") == "me"


@pytest.mark.parametrize(("size", "rank"), [("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")])
def test_launchers_are_known_by_their_environment(monkeypatch, size, rank):
    for name in (*processes.SIZES, *processes.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(size, "2")
    monkeypatch.setenv(rank, "1")
    assert processes.several() and not processes.main() and processes.rank() == 1 and processes.count() == 2
    monkeypatch.setenv(size, "1")
    assert not processes.several() and processes.main()


def shared_work():
    done = []

    def square(x):
        assert not processes.several()  # what is done in one's turn is done by oneself
        done.append(x)
        return x * x

    found = processes.dealt([5, 6, 7, 8, 9], square)
    return {"found": found, "done": done, "main": processes.agreed(os.getpid), "own": os.getpid(), "turns": [processes.turn(i) for i in range(3)]}


def test_work_is_dealt_out_and_the_main_process_decides(tmp_path):
    first, second = two(shared_work, tmp_path)
    assert first["found"] == second["found"] == [25, 36, 49, 64, 81]
    assert first["done"] == [5, 7, 9] and second["done"] == [6, 8]
    assert first["main"] == second["main"] == first["own"] != second["own"]
    assert first["turns"] == [True, False, True] and second["turns"] == [False, True, False]


def an_error():
    def fail():
        raise ValueError("--out x: give another")

    try:
        processes.agreed(fail)
    except ValueError as error:
        return str(error)


def test_an_error_of_the_main_process_is_everybodys(tmp_path):
    started = time.monotonic()
    assert two(an_error, tmp_path) == ["--out x: give another"] * 2 and time.monotonic() - started < 60


def a_stage(folder):
    from graphs.artifact import locked, stage

    made = []

    def make(out):
        made.append(str(out))
        processes.agreed(lambda: (out / "file").write_text("whole"))
        return {"value": 3}

    with locked(folder):
        first, again = stage(folder / "stage", "key", make), stage(folder / "stage", "key", make)
    return {"made": made, "first": first, "again": again, "left": sorted(path.name for path in folder.iterdir())}


def test_a_stage_is_made_together_and_written_once(tmp_path):
    first, second = two(a_stage, tmp_path / "said", tmp_path / "run")
    assert first["first"] == second["first"] == [{"key": "key", "value": 3}, False]
    assert first["again"] == second["again"] == [{"key": "key", "value": 3}, True] and len(first["made"]) == len(second["made"]) == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "stage"]
    assert (tmp_path / "run" / "stage" / "file").read_text() == "whole"


def a_taken_folder(folder):
    from graphs.artifact import locked

    try:
        with locked(folder):
            return "free"
    except ValueError as error:
        return str(error)


def test_a_folder_in_use_is_refused_by_all(tmp_path):
    from graphs.artifact import locked

    assert two(a_taken_folder, tmp_path / "a", tmp_path / "run") == ["free", "free"]
    with locked(tmp_path / "run"):
        said = two(a_taken_folder, tmp_path / "b", tmp_path / "run")
    assert said[0] == said[1] and "another run is using this folder" in said[0]


@pytest.mark.parametrize(("several", "last"), [("1", "the interpreter went"), ("2", "exits are heard")])
def test_one_of_several_ends_before_its_interpreter_goes(several, last):
    """What threads of gloo do while an interpreter is finalised aborts it, once in some hundred runs: so it is not finalised."""
    code = ("import atexit, os\nfrom graphs import processes\natexit.register(print, 'exits are heard')\n"
            "class Held:\n    def __del__(self): print('the interpreter went')\n"
            "held = Held()\nprocesses.end(3)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": several, "RANK": "0"})
    assert done.returncode == 3 and done.stdout.splitlines()[-1] == last, done.stderr
