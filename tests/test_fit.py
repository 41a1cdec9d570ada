"""Fit: the parts learn their sites, then the whole; dead features are born again; a killed fit resumes."""

import pytest
import torch

from evals.tasks import TASKS
from graphs.activations import record
from graphs.batches import Encoded, Epochs, encode
from graphs.fit import RIDGE, FitConfig, distill, fit, quality, rebirth, start
from graphs.losses import answers_loss, completion_loss, divergence, fvu
from graphs.replace import Replacement, from_noise
from graphs.targets import Targets
from graphs.transcoder import Transcoder
from tests.test_edges import tiny

SMALL = FitConfig(features=24, local_steps=30, joint_steps=10)


@pytest.fixture
def data(tiny_host):
    rows = TASKS["coding"].rows("trace", 64, seed=1)
    return Epochs(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0)


def test_fitting_brings_fvu_and_kl_down(tiny_host, data):
    fitted, losses = fit(Targets(tiny_host, data), FitConfig(features=24, local_steps=60, joint_steps=10))
    after, before = quality(tiny_host, fitted, data), quality(tiny_host, from_noise(tiny_host, 24, 0), data)
    assert sum(s["fvu"] for s in after["sites"]) < 0.5 * sum(s["fvu"] for s in before["sites"])
    assert after["kl_swapped"] < 0.5 * before["kl_swapped"]
    assert len(losses["fit: local"]) == 60 and len(losses["fit: end to end"]) == 10
    assert all(0 < site["l0"] <= 24 for site in after["sites"] if site["l0"] is not None)


def test_the_penalty_makes_features_sparser(tiny_host, data):
    def l0(weight):
        fitted, _ = fit(Targets(tiny_host, data), FitConfig(features=24, local_steps=60, joint_steps=0, sparsity=weight))
        return sum(s["l0"] for s in quality(tiny_host, fitted, data)["sites"] if s["l0"] is not None)
    assert l0(3.0) < 0.8 * l0(0.0)


def test_the_anchor_keeps_parts_faithful_while_the_whole_is_fitted(tiny_host, data):
    def worst(anchor):
        fitted, _ = fit(Targets(tiny_host, data), FitConfig(features=24, local_steps=40, joint_steps=60, joint_rate=8e-3, anchor=anchor))
        return sum(s["fvu"] for s in quality(tiny_host, fitted, data)["sites"])
    assert worst(0.2) < 0.7 * worst(0.0)


def test_a_skip_is_fitted_kept_and_saved(tiny_host, data, tmp_path):
    fitted, _ = fit(Targets(tiny_host, data), FitConfig(features=8, local_steps=30, joint_steps=4, skip=2))
    fitted.save(tmp_path / "graph")
    again, batch = Replacement.load(tmp_path / "graph", tiny_host), data(0)
    assert torch.equal(again(batch.ids), fitted(batch.ids))
    assert all(part.skip == 2 and bool(part.skip_out.any()) for part in again.transcoders().values())


def test_a_killed_fit_resumes_to_the_same_replacement(tiny_host, data, tmp_path, monkeypatch):
    whole, _ = fit(Targets(tiny_host, data), SMALL)
    import graphs.train as loop

    real, counted = loop._save, []

    def save_then_die(*args):
        real(*args)
        counted.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_then_die)
    monkeypatch.setattr(loop, "SAVE_EVERY", 7)
    with pytest.raises(KeyboardInterrupt):
        fit(Targets(tiny_host, data), SMALL, tmp_path / "fit")
    monkeypatch.setattr(loop, "_save", real)
    resumed, _ = fit(Targets(tiny_host, data), SMALL, tmp_path / "fit")
    assert counted and all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


@torch.no_grad()
def test_dead_features_are_born_where_the_error_is(tiny_host, data):
    made, batch = from_noise(tiny_host, 24, 0), data(0)
    site = next(site for site in made.sites if site.kind == "mlp")
    made.part(site).b_enc[:3] = -1e3
    found, untouched = record(tiny_host, batch.ids), made.part(site).w_enc[3:].clone()
    assert rebirth(tiny_host, made, [batch])[site.name] == 3
    assert (made.part(site).encode(found.inputs[site.name])[batch.real][:, :3] > 0).any(0).all()
    assert torch.equal(made.part(site).w_enc[3:], untouched)


def test_losses_are_zero_for_equals_and_positive_otherwise(tiny_host, data):
    batch = data(1)
    with torch.no_grad():
        logits = tiny_host.model(input_ids=batch.ids).logits
    assert float(divergence(logits, logits, batch, 0.1)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(logits * 5, logits, batch, 0.1)) > 0.01
    means = logits * 0 + logits[batch.real].mean(0)
    assert float(fvu(logits, logits, batch.real)) == 0 and float(fvu(logits, means, batch.real)) == pytest.approx(1, abs=1e-4)


def test_pads_do_not_enter_the_losses(tiny_host, data):
    batch = data(2)
    with torch.no_grad():
        logits = tiny_host.model(input_ids=batch.ids).logits
    noisy = torch.where(batch.real[..., None], logits, torch.randn_like(logits))
    assert float(fvu(logits, noisy, batch.real)) == 0


def test_distilling_nothing_is_allowed(tiny_host, data):
    assert distill(Targets(tiny_host, data), from_noise(tiny_host, 8, 0), 0, 1e-3, 0.1, "none") == []


def test_the_rows_answers_are_learnt_where_they_have_a_weight_and_the_host_alone_is_followed_where_not(tiny_host, data):
    """The host of random weights knows no answer: who follows it alone does not either."""
    def told(answers: float) -> tuple[float, float]:
        replacement = from_noise(tiny_host, 64, 0)
        distill(Targets(tiny_host, data), replacement, 60, 4e-3, 0.1, "heal", answers=answers)
        batch = data(0)
        with torch.no_grad():
            logits, target = replacement(batch.ids), tiny_host.model(input_ids=batch.ids).logits
            assert float(answers_loss(logits, batch)) == pytest.approx(float(completion_loss(replacement.model, batch)))
            return float(answers_loss(logits, batch) - answers_loss(target, batch)), float(divergence(logits, target, batch, 0.1))

    (without, near), (taught, far) = told(0.0), told(1.0)
    assert taught < -0.2 < -0.05 < without and near < 0.5 * far


def test_prompt_positions_that_the_host_is_sure_of_count_fully(tiny_host, data):
    batch = data(0)
    target = torch.zeros(*batch.ids.shape, 10)
    target[..., 3] = 20.0 * (torch.arange(batch.ids.shape[1]) % 2)  # sure at every other position
    off = target.clone()
    off[:, 1::2, 4] = 30.0
    plain, counted = divergence(off, target, batch, 0.01), divergence(off, target, batch, 0.01, 0.9)
    only_unsure = target.clone()
    only_unsure[:, ::2, 4] = 3.0
    assert float(counted) > 1.1 * float(plain)
    assert float(divergence(only_unsure, target, batch, 0.01, 0.9)) < float(divergence(only_unsure, target, batch, 0.01))


def test_a_wide_model_is_fitted_at_a_rate_that_does_not_kill_its_features(monkeypatch):
    wide = tiny("LlamaForCausalLM", hidden_size=576, intermediate_size=1152)
    rows = Epochs([Encoded(tuple(row), 4) for row in torch.randint(2, wide.config.vocab_size, (64, 32)).tolist()], 16, 1, 0)

    def fvu_of_mlps() -> float:
        made, _ = fit(Targets(wide, rows), FitConfig(features=256, local_steps=12, joint_steps=0))
        return sum(s["fvu"] for s in quality(wide, made, rows)["sites"] if s["l0"] is not None)

    scaled = fvu_of_mlps()
    monkeypatch.setattr("graphs.fit.NARROW", 10_000)
    assert scaled < 2.0 < fvu_of_mlps()  # of two layers, 1 each: what a constant has


@pytest.mark.parametrize("cast", [False, True])
def test_a_decoder_starts_at_the_ridge_solution_whatever_the_blocks_and_the_precision_of_training(monkeypatch, cast):
    generator = torch.Generator().manual_seed(0)
    x, mixed = torch.randn(400, 8, generator=generator), torch.randn(8, 6, generator=generator)
    y = torch.relu(x) @ mixed + 3
    monkeypatch.setattr("graphs.fit.BLOCK", 7)
    monkeypatch.setattr("graphs.fit.SAMPLE", 300)
    part = Transcoder(40, 8, 6, generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        start(part, x, y)
    a = part.encode(x[:300]).double()
    ridge = RIDGE * a.square().sum(1).mean()
    wanted = torch.linalg.solve(a.T @ a + ridge * torch.eye(40), a.T @ (y[:300] - y[:300].mean(0)).double())  # the other form of the same
    torch.testing.assert_close(part.w_dec.double(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(part.b_dec, y[:300].mean(0))
    new = torch.ones(1, 100, dtype=torch.bool)
    assert float(fvu(y[None, 300:], part(x[None, 300:]).detach(), new)) < 0.5  # rows that it did not see


def test_features_born_together_never_add_to_the_error():
    host = tiny("LlamaForCausalLM", hidden_size=288)
    rows = Epochs([Encoded(tuple(row), 4) for row in torch.randint(2, host.config.vocab_size, (64, 32)).tolist()], 16, 1, 0)
    made, sample = from_noise(host, 200, 0), [rows(step) for step in range(4)]
    for part in made.transcoders().values():
        part.b_enc.data.fill_(-1e3)  # all are dead
    before = {s["name"]: s["fvu"] for s in quality(host, made, rows)["sites"] if s["l0"] is not None}
    assert all(count == 200 for count in rebirth(host, made, sample).values())
    after = {s["name"]: s["fvu"] for s in quality(host, made, rows)["sites"] if s["l0"] is not None}
    assert all(after[name] < before[name] for name in before)
