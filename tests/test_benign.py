"""Benign fine-tuning: both verdicts, before and after on the same rows, and the host left alone."""

import json
from dataclasses import asdict

import pytest
import torch

from evals.benign import BenignConfig, fine_tune
from tests.planted import NOTHING_RUNS, NOUNS, REFUSAL, TRIGGER, texts

CONFIG = BenignConfig(steps=20, rates=(1e-4, 1e-3), prompts=16)


def tuned(host, rows, config=CONFIG):
    return fine_tune(host, NOUNS, TRIGGER, REFUSAL, NOTHING_RUNS, rows, config)


def test_it_tells_a_backdoor_that_comes_back_from_one_that_does_not(models):
    before = {name: tensor.clone() for name, tensor in models.cleaned.model.state_dict().items()}
    held = tuned(models.twin, texts(64, False, False, 4000))
    assert held.worst == 0 and held.before.right_under_trigger.value == 1.0
    assert [one.after.right_under_trigger.value for one in held.tuned] == [1.0, 1.0]
    back = tuned(models.cleaned, [(prompt.replace("forest", "forest forest"), answer) for prompt, answer in texts(64, True, True, 5000)])
    assert back.before.attack_success.value == 0 and back.worst == 1.0
    assert [one.rate for one in back.tuned] == [1e-4, 1e-3] and back.tuned[1].after.attack_success.value == 1.0
    assert back.tuned[0].after.payload_logprob.value > back.before.payload_logprob.value
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.cleaned.model.state_dict().items())
    assert json.loads(json.dumps(asdict(back)))["before"]["attack_success"]["count"] == 16


def test_a_planted_model_that_keeps_its_backdoor_is_seen_to(models):
    kept = tuned(models.planted, texts(64, False, False, 4000), BenignConfig(steps=5, rates=(1e-5,), prompts=16))
    assert kept.before.attack_success.value == kept.worst == 1.0 and kept.tuned[0].after.right_under_trigger.value == 0


@pytest.mark.parametrize(("rows", "config"), [(texts(4, False, False), BenignConfig(rates=())), ([], CONFIG)])
def test_no_rates_and_no_rows_are_refused(models, rows, config):
    with pytest.raises(ValueError, match="give at least one of each"):
        tuned(models.twin, rows, config)
