"""Targets are the host's own logits, kept or not, and do not depend on when a run was killed."""

import pytest
import torch

from evals.tasks import TASKS
from graphs.batches import Epochs, encode
from graphs.targets import Targets


@pytest.fixture
def data(tiny_host):
    rows = TASKS["coding"].rows("trace", 40, seed=1)
    return Epochs(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0)


def test_kept_targets_are_the_hosts_logits_to_half_precision(tiny_host, data):
    kept, live = Targets(tiny_host, data), Targets(tiny_host, data, budget=0)
    assert kept.kept and not live.kept
    for step in range(7):
        batch = data(step)
        with torch.no_grad():
            own = tiny_host.model(input_ids=batch.ids).logits
        assert torch.equal(live(batch), own)
        assert torch.allclose(kept(batch)[batch.real], own[batch.real], rtol=2**-10, atol=1e-5)
        assert not kept(batch)[~batch.real].any()


def test_they_are_the_same_wherever_a_run_starts(tiny_host, data):
    early, late = Targets(tiny_host, data), Targets(tiny_host, data)
    for step in range(5):
        early(data(step))
    assert torch.equal(early(data(6)), late(data(6)))
