"""The plan on paper: operations are counted as torch counts them, the committed constants give the page, and its arithmetic is sane."""

import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale


def test_the_page_is_made_of_the_committed_constants():
    assert scale.write() == scale.PAGE.read_text(), "python benchmarks/scale.py write"


def test_operations_are_what_torch_counts_in_real_steps():
    shape, features = scale.Shape("tiny", 64, 2, 4, 2, 96, 256), 80
    targets = scale.prepared(shape, 4, 8)
    targets(targets.batches(0))
    tokens = 4 * 8

    def counted(run, steps: int) -> int:
        with FlopCounterMode(display=False) as counter:
            run(steps)
        return counter.get_total_flops()

    for name, run in scale.stages(targets, features).items():
        one = (counted(run, 2) - counted(run, 1)) / tokens
        # what is left out is attention's own products, which short rows keep small
        assert one == pytest.approx(scale.operations(shape, features, name, known=True), rel=0.05), name


def test_hours_follow_tokens_and_gpus_and_memory_the_shards():
    constants = json.loads(scale.RESULTS.read_text())
    eight, seventy = scale.BIG
    assert eight.body == pytest.approx(6.98e9, rel=0.01) and seventy.body == pytest.approx(68.45e9, rel=0.01)
    one, twice, wide = (scale.plan(eight, 16384, gpus, tokens, constants) for gpus, tokens in ((8, 1e9), (8, 2e9), (16, 1e9)))
    assert twice["all"] == pytest.approx(2 * one["all"]) and one["all"] == pytest.approx(2 * wide["all"])
    assert one["all"] == pytest.approx(sum(one[name] for name in (*scale.SPLIT, "heal"))) and one["disk"] == wide["disk"]
    assert one["layers"] < one["one unit"] and wide["one unit"] < one["one unit"]
    assert sum(scale.divided(1e9).values()) == pytest.approx(1e9) and all(tokens > 0 for tokens in scale.divided(1e9).values())
    assert all(0 < stage["share"] < 1 for stage in constants["stages"].values())
