"""The loop: a killed run resumes to the same weights; state is safetensors; rates follow the schedule."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphs.train import TrainConfig, discard, precision, rate, train
from tests.launched import two

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


def test_the_launcher_or_its_variable_says_what_training_computes_in(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    for native in (True, False):
        monkeypatch.setattr("graphs.train.native_bf16", lambda native=native: native)
        assert precision() == ("bf16" if native else "no")
        for asked in ("bf16", "no"):
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
            assert precision() == asked
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=fp8: training is done in bf16 or in float32; set it to bf16 or to no"):
        precision()


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


def part_of(folder, steps_before_death=None):
    """The problem, each process on its share of a step's rows."""
    from graphs.processes import count, rank, several
    from graphs.processes import state as processes
    from graphs.shares import full, weighed

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net.unused = nn.Linear(4, 4)  # has no gradient anywhere, and must not decay
    x, y, where = torch.randn(12, 7, 6), torch.randn(12, 7, 3), processes().device if several() else "cpu"
    net, x, y = net.to(where), x.to(where), y.to(where)
    before = net.unused.weight.clone()

    def loss(step):
        mine = slice(rank(), None, count())
        errors = (net[2](net[1](net[0](x[step, mine]))) - y[step, mine]).square().mean(1)  # parts are called by themselves
        return weighed(errors.mean(), len(errors))

    def die(step):
        if step == steps_before_death:
            raise ValueError("killed")

    losses = []
    try:
        losses = train(net, loss, CONFIG, "t", folder and folder / "state", save_every=3, after=die)
    except ValueError:
        assert steps_before_death is not None
    finally:
        kept = {"losses": losses, "weights": torch.cat([p.detach().flatten() for p in net[:3].parameters()]).tolist() if losses else None,
                "unused": torch.equal(full(net.unused.weight.detach()), before)}
    return kept


def sharded_part_of(folder, steps_before_death=None):
    """The same with FSDP2, which accelerate has for GPUs only: its `prepare` is done by hand."""
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from graphs.processes import state
    from graphs.shares import in_shards

    def prepare(self, module, optimizer):
        before = dict(module.named_parameters())
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        after = dict(module.named_parameters())
        assert all(in_shards(p) for p in after.values())
        places = {id(before[name]): after[name] for name in before}
        for group in optimizer.param_groups:
            group["params"] = [places[id(p)] for p in group["params"]]
        return module, optimizer

    state()
    Accelerator.prepare = prepare
    return part_of(folder, steps_before_death)


@pytest.mark.parametrize("way", [part_of, sharded_part_of])
def test_two_processes_train_as_one_and_either_goes_on_where_the_other_was_killed(way, tmp_path):
    whole = part_of(None)
    assert whole["unused"]
    for said in two(way, tmp_path / "a", None):
        assert said["losses"] == pytest.approx(whole["losses"], rel=1e-5) and said["weights"] == pytest.approx(whole["weights"], abs=1e-5)
        assert said["unused"]
    two(way, tmp_path / "b", tmp_path / "run", 7)
    after_two = part_of(tmp_path / "run")
    part_of(tmp_path / "again", 7)
    after_one = two(way, tmp_path / "c", tmp_path / "again")[0]
    for said in (after_two, after_one):
        assert said["losses"] == pytest.approx(whole["losses"], rel=1e-5) and said["weights"] == pytest.approx(whole["weights"], abs=1e-5)
        assert said["losses"] != whole["losses"]  # so both kinds of run have been at it


ON_GPUS = """
import json, sys
from pathlib import Path
from graphs.processes import main
from tests.test_train import part_of
said = part_of(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None)
if main():
    print("SAID", json.dumps(said))
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP2 is accelerate's for GPUs, and two are needed")
def test_fsdp2_on_gpus_trains_as_one_process_and_one_goes_on_where_it_was_killed(tmp_path):
    (tmp_path / "script.py").write_text(ON_GPUS)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
              "--mixed_precision", "no", "--main_process_port", "0", tmp_path / "script.py"]
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    whole = part_of(None)
    done = subprocess.run([*launch, tmp_path / "a"], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.split("SAID ", 1)[1].splitlines()[0])
    assert said["unused"] and said["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    subprocess.run([*launch, tmp_path / "b", "7"], env=path, check=True)
    assert part_of(tmp_path / "b")["losses"] == pytest.approx(whole["losses"], rel=1e-3)
