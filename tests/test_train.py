"""The loop: a killed run resumes to the same weights; state is safetensors; rates follow the schedule."""

import pytest
import torch
from torch import nn

from graphs.train import TrainConfig, discard, rate, train

CONFIG = TrainConfig(steps=12, learning_rate=0.05, weight_decay=0.1)


def problem():
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    x, y = torch.randn(12, 8, 6), torch.randn(12, 8, 3)
    return net, lambda step: (net(x[step]) - y[step]).square().mean()


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole, loss = problem()
    losses = train(whole, loss, CONFIG, "t")
    killed, loss = problem()

    def die(step):
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed, loss, CONFIG, "t", tmp_path / "state", save_every=3, after=die)
    fresh, loss = problem()
    resumed = train(fresh, loss, CONFIG, "t", tmp_path / "state", save_every=3)
    assert resumed == losses and torch.equal(fresh.weight, whole.weight)
    again, loss = problem()
    # finished: nothing is done twice
    assert train(again, loss, CONFIG, "t", tmp_path / "state") == losses and torch.equal(again.weight, whole.weight)
    discard(tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_training_ends_where_it_is_told_to():
    stopped, loss = problem()
    losses = train(stopped, loss, CONFIG, "t", after=lambda step: step == 4)
    whole, loss = problem()
    assert losses == train(whole, loss, CONFIG, "t")[:5] and not torch.equal(stopped.weight, whole.weight)


def test_frozen_parameters_stay_and_rates_scale_by_prefix():
    net, loss = problem()
    net.bias.requires_grad_(False)
    before = net.bias.clone()
    still, _ = problem()
    train(net, loss, CONFIG, "t", rates={"weight": 0.0})
    assert torch.equal(net.bias, before) and torch.equal(net.weight, still.weight)


def test_the_schedule_warms_up_and_decays_to_its_floor():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, decay=0.5, floor=0.1)
    rates = [rate(config, step) for step in range(101)]
    assert rates[0] < rates[5] < rates[10] == 1 == rates[49] > rates[80] > rates[100] == pytest.approx(0.1)


def test_attention_runs_in_float32_while_training(tiny_host, monkeypatch):
    """Rotary queries are float32 already, and autocast would round them again on the way into the slow kernel."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, *args, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return real(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_host.model(input_ids=torch.tensor([[0, 5, 6, 7]])).logits.sum().backward()
    assert seen and set(seen) == {(torch.float32, False)}
