"""Mending: the largest hole gets smaller at no more active features, nothing else moves, and a killed mend goes on as it would have."""

import pytest
import torch

from distill import config
from evals.tasks import TASKS
from graphs import mend
from graphs.activations import first, hooks, record
from graphs.batches import Epochs, encode
from graphs.fit import FitConfig, fit, quality, run_part
from graphs.host import load
from graphs.replace import Replacement
from graphs.targets import Targets
from tests.launched import two

SETTINGS = FitConfig(features=24, local_steps=60, joint_steps=10)


def rows_of(host, split, count=64):
    rows = TASKS["coding"].rows(split, count, seed=1)
    return Targets(host, Epochs(encode(host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0))


@pytest.fixture(scope="module")
def fitted(tiny_model_folder, tmp_path_factory):
    made, _ = fit(rows_of(load(tiny_model_folder), "trace"), SETTINGS)
    made.save(folder := tmp_path_factory.mktemp("mend") / "graph")
    return folder


def test_one_part_alone_is_the_model_with_that_sites_output_in_its_place(tiny_host, fitted):
    replacement = Replacement.load(fitted, tiny_host)
    batch = rows_of(tiny_host, "test").batches(0)
    before = tiny_host.model(input_ids=batch.ids).logits
    for site in replacement.sites:
        written = run_part(replacement, site, record(tiny_host, batch.ids))

        def instead(_module, _args, output, written=written):
            return (written, *output[1:]) if isinstance(output, tuple) else written.reshape(first(output).shape)

        with hooks() as handles, torch.no_grad():
            handles.append(tiny_host.module(site.writes).register_forward_hook(instead))
            expected = tiny_host.model(input_ids=batch.ids).logits
        assert torch.allclose(mend.alone(tiny_host, replacement, site)(input_ids=batch.ids).logits, expected, atol=1e-5)
        assert (expected - before).abs().max() > 1e-3
    assert torch.equal(tiny_host.model(input_ids=batch.ids).logits, before)  # the host itself is as it was


def test_the_largest_hole_gets_smaller_on_held_out_text_with_no_more_active(tiny_host, fitted):
    held, replacement = rows_of(tiny_host, "test"), Replacement.load(fitted, tiny_host)
    was, found = quality(tiny_host, replacement, held.batches, 8), mend.holes(held, replacement, 8)
    before = {name: value.clone() for name, value in replacement.state_dict().items()}
    losses = mend.mend(rows_of(tiny_host, "trace"), replacement, 60, SETTINGS, 70)
    top, = (name.removeprefix("mend ") for name in losses)
    after, now = mend.holes(held, replacement, 8), quality(tiny_host, replacement, held.batches, 8)
    l0 = [next(site["l0"] for site in one["sites"] if site["name"] == top) for one in (was, now)]
    assert after[top] < 0.7 * found[top] and top == max(found, key=found.get) and (l0[0] is None or l0[1] <= 1.02 * l0[0])
    assert now["kl_swapped"] < 1.05 * was["kl_swapped"]
    path = next(site.module for site in replacement.sites if site.name == top)
    moved = [name for name, value in replacement.state_dict().items() if not torch.equal(value, before[name]) and not name.endswith(".mean")]
    assert moved and all(name.startswith(f"model.{path}.") for name in moved)
    assert all(p.requires_grad for p in replacement.part(replacement.sites[-1]).parameters())  # all else may be trained again


def test_the_penalty_answers_to_how_many_are_active(tiny_host, fitted, monkeypatch):
    def l0(hold):
        monkeypatch.setattr(mend, "HOLD", hold)
        replacement = Replacement.load(fitted, tiny_host)
        monkeypatch.setattr(mend, "holes", lambda *_: {"L0.mlp": 1.0})
        mend.mend(rows_of(tiny_host, "trace"), replacement, 120, FitConfig(features=24, sparsity=1.0), 70)
        return quality(tiny_host, replacement, rows_of(tiny_host, "test").batches, 8)["sites"][1]["l0"]

    usual = quality(tiny_host, Replacement.load(fitted, tiny_host), rows_of(tiny_host, "test").batches, 8)["sites"][1]["l0"]
    assert abs(l0(40.0) / usual - 1) < 0.5 * abs(l0(0.0) / usual - 1)


def test_a_killed_mend_goes_on_to_the_same_part(tiny_host, fitted, tmp_path, monkeypatch):
    whole = Replacement.load(fitted, tiny_host)
    mend.mend(rows_of(tiny_host, "trace"), whole, 30, SETTINGS, 70)
    import graphs.train as loop

    monkeypatch.setattr(loop, "SAVE_EVERY", 10)
    real = loop._save

    def dies(*args):
        real(*args)
        if args[3] == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        mend.mend(rows_of(tiny_host, "trace"), Replacement.load(fitted, tiny_host), 30, SETTINGS, 70, tmp_path / "state")
    monkeypatch.setattr(loop, "_save", real)
    again = Replacement.load(fitted, tiny_host)
    mend.mend(rows_of(tiny_host, "trace"), again, 30, SETTINGS, 70, tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def mended(model, graph):
    host = load(model)
    return mend.mend(rows_of(host, "trace"), Replacement.load(graph, host), 12, SETTINGS, 70)


@pytest.mark.slow
def test_two_processes_that_have_no_targets_yet_mend_what_one_does(tiny_model_folder, fitted, tmp_path):
    alone, both = mended(tiny_model_folder, fitted), two(mended, tmp_path / "said", tiny_model_folder, fitted)
    (name, losses), = alone.items()
    assert [list(one) for one in both] == [[name]] * 2 and both[0][name] == pytest.approx(losses, rel=1e-2) == both[1][name]


def test_there_must_be_something_to_mend():
    with pytest.raises(ValueError, match="--mend-steps does not go with --basis neurons --attention kept"):
        config.check(config.Fit(basis="neurons", attention="kept", mend_steps=10))
