"""The race against the peers: what it reads from curves, what it refuses, and what it writes for both sides."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from distill.runs import bare
from graphs.dictionary import Dictionary

ROOT = Path(__file__).parent.parent


def test_time_to_equal_fvu_is_read_between_chunks():
    mine = {"fvu": [1.0, 0.5, 0.25], "seconds": [0.0, 2.0, 2.0]}
    other = {"fvu": [1.2, 0.8, 0.4], "seconds": [0.0, 8.0, 8.0]}
    assert peers.reached(mine, 0.75) == pytest.approx(1.0) and peers.reached(other, 0.6) == pytest.approx(12.0)
    level, times = peers.to_equal(mine, other)
    assert level == 0.4 and times == pytest.approx(16.0 / (2.0 + 2.0 * 0.4))
    with pytest.raises(ValueError, match="not reached"):
        peers.reached(mine, 0.1)


def test_a_missing_environment_is_refused_in_a_sentence(tmp_path):
    got = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "peers.py"), "fit", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 1 and got.stderr.count("\n") == 1 and str(tmp_path) in got.stderr and "--help" in got.stderr


def test_what_both_sides_trace_is_what_was_written(tmp_path):
    shape = peers.Graph(2, 32, 256, 8)
    task = peers.written(tmp_path, shape)
    subject = bare(str(tmp_path / "model"), str(tmp_path / "transcoders"), None).subject
    assert len(task["ids"]) == shape.tokens
    found = subject.trace(torch.tensor([task["ids"]]))
    for name, part in subject.basis.items():
        if isinstance(part, Dictionary):
            assert 0.005 < float((part.activations(found.sites[name].x) > 0).float().mean()) < 0.1
