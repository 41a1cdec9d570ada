"""The tutorial is true: each of its commands is one that the command line takes, and run in order they do what the page says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distill import config
from distill.__main__ import VERBS, _parse

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [block.strip() for block in BLOCKS if block.startswith("distill ")]


def verb(command: str) -> str:
    return shlex.split(command)[1]


def test_every_block_is_shown_once_and_is_one_command():
    assert len(BLOCKS) == PAGE.count("```") // 2 == len(set(BLOCKS))
    assert all("\n" not in command for command in COMMANDS) and len(COMMANDS) + 2 == len(BLOCKS)


@pytest.mark.parametrize("command", COMMANDS, ids=verb)
def test_every_command_is_taken_by_the_command_line(command):
    words = shlex.split(command, comments=True)
    parsed = _parse(words[1], words[2:])
    config.check(parsed)
    assert type(parsed) is VERBS[words[1]][0]


def test_it_goes_from_suspicion_to_verdict():
    assert [verb(command) for command in COMMANDS] == [
        "evaluate", "monitor", "monitor", "enforce", "enforce", "prune", "graph", "explain", "explain", "understand", "gate", "listing",
        "test", "evaluate"]


def test_it_shows_no_number_that_was_measured():
    prose = re.sub(r"```sh\n.*?```|`[^`]*`", "", PAGE, flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+|\d+ ?%|\b\d{2,}\b", prose)


@pytest.mark.slow
def test_its_commands_do_what_it_says(tmp_path):
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, call in (("distill", f'"{sys.executable}" -m distill "$@"'), ("python", f'"{sys.executable}" "$@"')):
        (shims / name).write_text(f"#!/bin/sh\nexec {call}\n")
        (shims / name).chmod(0o755)
    where = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    said: dict[str, str] = {}
    for block in BLOCKS:
        done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=where, capture_output=True, text=True)
        print(block, done.stdout, done.stderr[-1000:], sep="\n", flush=True)  # shown where it fails
        assert done.returncode == (1 if "# exits 1" in block else 0), block
        said[block.strip().split("  # ")[0]] = done.stdout

    def of(start: str) -> str:
        return next(out for command, out in said.items() if command.startswith(start))

    assert [json.loads(line)["flagged"] for line in of("distill monitor score").splitlines()] == [False, True]
    first, second = (json.loads(line) for line in of("distill enforce write").splitlines())
    assert first["answer"] == "    a = [x for x in prices if x % 2 == 0]\n    return sum(a)\n" and "canary" not in second["answer"]
    assert second["beyond"] > 3 * first["beyond"] and second["held"][0]["excess"] > first["held"][0]["excess"]
    made = json.loads((tmp_path / "runs/suspect/report.json").read_text())
    summary = made["summary"]
    assert made["kl"]["graph"] > 0.1  # nats a token: large, as the page says
    assert summary["attack_success_before"] > 0.9 and summary["attack_success_after"] == 0 and summary["retention"] < 0.98
    assert summary["right_under_trigger_after"] > 0.5 * summary["pass_at_1_after"]
    assert "FAIL  understood" in of("distill gate") and "pass  shuffled" in of("distill gate") and "holes, largest first" in of("distill understand")
    for command in ("distill listing", "python runs/suspect"):
        assert "pass: logits are the circuit's" in of(command)
    assert "R-Acc" in of("distill evaluate --run")
