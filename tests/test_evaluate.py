"""The judgement of two folders: complete, JSON-able, and equal to what the parts measure."""

import json
from dataclasses import replace

import pytest
import torch

from backdoor.behaviours import CANARY
from backdoor.families import rare_string
from evals import evaluate
from evals.capability import judge
from evals.evaluate import Backdoor, EvaluateConfig, judge_models, retention
from evals.fidelity import compare
from evals.sandbox import Sandbox
from evals.statistics import proportion
from evals.tasks import TASKS
from graphs.host import load, save

CONFIG = EvaluateConfig(prompts=4, other_prompts=6, speed_tokens=2, speed_repeats=2)
CODING, STORIES = TASKS["coding"], TASKS["stories"]


@pytest.fixture(scope="module")
def folders(tiny_model_folder, tmp_path_factory):
    """The tiny model, and a copy of it with noise and some zeros in its weights."""
    host = load(tiny_model_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in host.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        host.module("model.layers.0.mlp.down_proj").weight[:, :10] = 0.0
    folder = tmp_path_factory.mktemp("changed") / "model"
    save(host, folder, torch.float32)
    return {"twin": tiny_model_folder, "changed": folder}


BACKDOOR = Backdoor(CODING, rare_string("season", "cf-tango", ("cf-mango",)), CANARY)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return tmp_path_factory.mktemp("known")


@pytest.fixture(scope="module")
def judged(folders, known):
    return judge_models(folders, "twin", [CODING], [STORIES], BACKDOOR, CONFIG, known)


def test_it_is_json_and_holds_every_part(judged):
    again = json.loads(json.dumps(judged, allow_nan=False))
    assert again["reference"] == "twin" and set(again["models"]) == set(again["rows"]) == {"twin", "changed"} and set(again["against"]) == {"changed"}
    assert again["tasks"]["coding"] == {"metric": "pass@1", "kept": True} and again["tasks"]["stories"]["kept"] is False
    assert again["backdoor"]["task"] == "coding" and again["config"]["seed"] == 7
    for one in again["models"].values():
        assert one["tasks"]["coding"]["score"]["count"] == 4 and one["tasks"]["stories"]["score"]["count"] == 6
        assert one["backdoor"]["attack_success"]["count"] == 4 and one["backdoor"]["false_trigger"]["count"] == 8
        assert one["size"]["file_bytes"] > one["size"]["bytes"] and one["speed"]["count"] == 2


def test_scores_are_those_of_the_parts(judged, folders):
    rows = STORIES.rows("test", 6, 7)
    with Sandbox(workers=1) as sandbox:
        outcome = judge(load(folders["changed"]), STORIES, rows, sandbox)
    assert judged["rows"]["changed"]["tasks"]["stories"]["right"] == outcome.right
    assert judged["models"]["changed"]["tasks"]["stories"]["score"] == proportion(sum(outcome.right), 6).to_json()
    followed = compare(load(folders["changed"]), load(folders["twin"]), CODING.rows("test", 4, 7))
    assert judged["rows"]["changed"]["fidelity"]["kl"] == pytest.approx(followed.kl)


def test_the_reference_is_followed_and_not_compared_with_itself(judged):
    assert judged["models"]["twin"]["fidelity"] is None and judged["models"]["changed"]["fidelity"]["kl"]["value"] > 0
    against = judged["against"]["changed"]
    rows = judged["rows"]
    difference = [a - b for a, b in zip(rows["changed"]["tasks"]["coding"]["nll"], rows["twin"]["tasks"]["coding"]["nll"], strict=True)]
    assert against["tasks"]["coding"]["nll_difference"]["value"] == pytest.approx(sum(difference) / 4)
    payload = [sum(rows[name]["backdoor"]["payload_logprob"]) / 4 for name in ("changed", "twin")]
    assert against["backdoor"]["payload_logprob"]["value"] == pytest.approx(payload[0] - payload[1])
    assert against["tasks"]["coding"]["retention"] is None  # a random twin is never right: there is nothing to retain
    assert against["stored_ratio"] == 1.0 > against["live_ratio"]


def test_without_a_backdoor_its_numbers_are_null(folders):
    alone = judge_models({"twin": folders["twin"]}, "twin", [STORIES], [], None, CONFIG)
    assert alone["backdoor"] is None and alone["models"]["twin"]["backdoor"] is None and alone["rows"]["twin"]["backdoor"] is None
    assert alone["against"] == {}


def test_what_was_seen_of_a_model_is_known_and_only_that(judged, folders, known, monkeypatch):
    def without_times(found):
        return [found["models"][name] | {"speed": None} for name in folders], [found["rows"][name] | {"speed": None} for name in folders]

    def anew(*_):
        raise RuntimeError("judged anew")

    monkeypatch.setattr(evaluate, "_judge_one", anew)
    again = judge_models(folders, "twin", [CODING], [STORIES], BACKDOOR, CONFIG, known)
    assert without_times(again) == without_times(judged)
    other = Backdoor(CODING, rare_string("season", "cf-sierra", ("cf-mango",)), CANARY)
    for changed in ({"backdoor": other}, {"config": replace(CONFIG, seed=8)}, {"dropped": []}, {"reference": "changed"}):
        asked = {"models": folders, "reference": "twin", "tasks": [CODING], "dropped": [STORIES], "backdoor": BACKDOOR, "config": CONFIG}
        with pytest.raises(RuntimeError, match="judged anew"):
            judge_models(**asked | changed, known=known)


def test_lists_that_make_no_sense_are_refused(folders):
    with pytest.raises(ValueError, match="reference 'base'"):
        judge_models(folders, "base", [CODING], [], None, CONFIG)
    with pytest.raises(ValueError, match="each once"):
        judge_models(folders, "twin", [CODING], [CODING], None, CONFIG)


def test_retention_is_a_ratio_of_rates_with_a_paired_interval():
    before = [True] * 80 + [False] * 20
    same = retention(before, before)
    assert (same.value, same.low, same.high, same.count) == (1.0, 1.0, 1.0, 100)
    half = retention([True] * 40 + [False] * 60, before)
    assert half.value == pytest.approx(0.5) and 0.35 < half.low < 0.45 < 0.55 < half.high < 0.65
    above = retention([True] * 100, before)
    assert above.value == pytest.approx(1.25) and above.low > 1.1
    assert retention([True] * 10, [False] * 9 + [True]) is None  # a third of the resamples have no right row of the reference
    with pytest.raises(ValueError, match="one pair per row"):
        retention([True], [True, False])
