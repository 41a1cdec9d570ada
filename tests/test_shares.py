"""Shares: two processes' losses and gradients on their shares are one process's on the batch."""

import pytest
import torch
from torch import nn

from graphs.batches import Batch, Epochs, encode
from graphs.losses import completion_loss, divergence, fvu, taught
from graphs.processes import count, rank
from graphs.shares import averaged, averaged_all, center, full, gathered, in_shards, make_whole, same, share, total, weighed
from tests.launched import two


def uneven() -> Batch:
    """Rows of very different lengths, so that a plain mean of the processes' means is far off."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 3, 8, 2, 9])
    ids = torch.randint(2, 20, (5, 9), generator=generator)
    real = torch.arange(9) < lengths[:, None]
    return Batch(ids, real, real & (torch.arange(9) >= lengths[:, None] // 2), (4, 7, 1, 3, 0))


class Small(nn.Module):
    """Ids to logits, and as a model with a `.logits`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.out = nn.Embedding(20, 6), nn.Linear(6, 20)

    def forward(self, input_ids):
        self.logits = self.out(self.table(input_ids).tanh())
        return self


def losses(whole: bool):
    batch, model = uneven(), Small()
    mine = batch if whole else share(batch)
    generator = torch.Generator().manual_seed(2)
    target, y = torch.randn(5, 9, 20, generator=generator) * 4, torch.randn(5, 9, 6, generator=generator)
    if not whole:
        target, y = target[rank() :: count()], y[rank() :: count()]
    kl = divergence(model(mine.ids).logits, target, mine, 0.1, 0.9)
    answered = taught(model(mine.ids).logits, target, mine, 0.1, 0.9, 0.7)
    ce = completion_loss(model, mine)
    missing = fvu(y, model.table(mine.ids), mine.real)
    size = model.table(mine.ids)[mine.real].abs().sum(-1)
    penalty = weighed(size.mean(), len(size))
    found = {}
    for name, value in (("kl", kl), ("taught", answered), ("ce", ce), ("fvu", missing), ("penalty", penalty)):
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
        used = averaged_all([g for g in gradients if g is not None])
        found[name] = [float(averaged(value)), *torch.cat([g.flatten() for g in used]).tolist()]
    return {"found": found, "rows": list(mine.rows), "naive": float(averaged(size.mean())), "center": center(y[mine.real]).tolist()}


def test_losses_and_gradients_of_shares_are_the_batchs(tmp_path):
    one, (first, second) = losses(True), two(losses, tmp_path, False)
    assert first["rows"] == [4, 1, 0] and second["rows"] == [7, 3]
    assert first["found"] == second["found"]
    for name, values in one["found"].items():
        assert first["found"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    assert first["center"] == pytest.approx(one["center"], abs=1e-6)
    assert abs(first["naive"] - one["found"]["penalty"][0]) > 1e-3  # without the weights it would be another loss


def test_a_loss_on_the_whole_batch_is_averaged_to_itself(tmp_path):
    one, (first, _) = losses(True), two(losses, tmp_path, True)
    assert all(first["found"][name] == pytest.approx(values, rel=1e-5, abs=1e-6) for name, values in one["found"].items())


def too_few():
    try:
        share(Batch(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)))
    except ValueError as error:
        return str(error)


def test_fewer_rows_than_processes_are_refused(tmp_path):
    assert set(two(too_few, tmp_path)) == {"--batch 1: fewer rows than the 2 processes; give at least 2, or start fewer processes"}


def measured(host, rows):
    from evals.fidelity import compare
    from evals.generate import complete, token_logprobs
    from evals.tasks import TASKS
    from graphs.targets import Targets

    texts = TASKS["coding"].rows("trace", 10, seed=1)
    prompts = [row.prompt for row in texts]
    summed, tokens = token_logprobs(host, rows, 3)
    targets = Targets(host, Epochs(rows, 4, host.tokenizer.eos_token_id, 0))
    return {"greedy": complete(host, prompts, 6, batch=3), "sampled": complete(host, prompts, 6, 1.0, 3, batch=3), "logprobs": summed.tolist(),
            "tokens": tokens.tolist(), "fidelity": compare(host, host, texts, 3).agreement, "targets": targets._all().float().sum(1).tolist()}


def test_what_is_measured_is_the_same_to_the_last_bit(tiny_host, tmp_path, monkeypatch):
    from evals.tasks import TASKS

    monkeypatch.setattr("graphs.targets.CHUNK", 4)
    rows = encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in TASKS["coding"].rows("trace", 10, seed=1)])
    one = measured(tiny_host, rows)
    assert two(measured, tmp_path, tiny_host, rows) == [one, one]


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from graphs.processes import state

    state()
    model = Small()
    before = model.out.weight.detach().clone()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    held = model.out.weight
    said = [in_shards(held), torch.equal(full(held.detach()), before)]
    with gathered(model):
        said += [not in_shards(model.out.weight), torch.equal(model.out.weight, before)]
        model.out.weight.data[3] = 7.0
    said += [model.out.weight is held, bool((full(held.detach())[3] == 7).all()), torch.equal(full(held.detach())[4:], before[4:])]
    make_whole(model)
    return [*said, not any(in_shards(p) for p in model.parameters()), bool((model.out.weight[3] == 7).all())]


def test_weights_in_shards_can_be_read_and_changed_whole(tmp_path):
    assert two(sharded, tmp_path) == [[True] * 9] * 2


def drifted():
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, float(rank()))
    same(net)
    return [float(net.weight.sum()), float(total(torch.tensor(rank() + 1.0)))]


def test_the_main_process_has_the_weights_that_all_go_on_with(tmp_path):
    assert two(drifted, tmp_path) == [[0.0, 3.0]] * 2
