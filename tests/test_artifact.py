"""Artifacts: whole or absent, found again by key, held by one process."""

import subprocess
import sys

import pytest

from graphs.artifact import digest, locked, read_json, stage, whole, write_json


def test_a_failing_block_leaves_the_old_artifact_and_no_trace(tmp_path):
    write_json(tmp_path / "a" / "x.json", 1)
    with pytest.raises(RuntimeError), whole(tmp_path / "a") as out:
        write_json(out / "x.json", 2)
        raise RuntimeError
    assert read_json(tmp_path / "a" / "x.json") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_stage_is_made_once_for_a_key(tmp_path):
    calls = []

    def make(out):
        calls.append(1)
        return {"n": len(calls)}

    assert stage(tmp_path / "s", "k", make) == ({"key": "k", "n": 1}, False)
    assert stage(tmp_path / "s", "k", make) == ({"key": "k", "n": 1}, True)
    assert stage(tmp_path / "s", "other", make)[0]["n"] == 2


def test_digests_follow_content_not_paths(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_folder_is_held_by_one_process(tmp_path):
    code = "import sys; from pathlib import Path; from graphs.artifact import locked\nwith locked(Path(sys.argv[1])): pass"
    with locked(tmp_path):
        held = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert held.returncode != 0 and "another run is using this folder" in held.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_broken_json_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="does not exist"):
        read_json(tmp_path / "y.json")
