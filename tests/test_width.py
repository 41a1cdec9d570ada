"""The narrower rival: what is kept is the most active, all of it is the model, and what was cut is nowhere in it."""

import pytest
import torch

from backdoor.removal import width
from distill.rivals import fitting_width
from evals.size import parameters
from evals.tasks import TASKS
from graphs.architectures import linear, writer
from graphs.batches import Epochs, encode
from graphs.host import Host, load, save
from graphs.targets import Targets
from tests.test_edges import tiny


@pytest.fixture
def targets(tiny_host, tiny_tokenizer):
    rows = encode(tiny_tokenizer, [(row.prompt, row.completion) for row in TASKS["coding"].rows("trace", 32, seed=1)])
    return Targets(tiny_host, Epochs(rows, 8, 1, 0))


def logits(host, ids):
    with torch.no_grad():
        return host.model(input_ids=ids).logits


def test_all_channels_and_neurons_are_the_model_and_dead_neurons_are_cut_for_nothing(targets):
    host, ids = targets.host, targets.batches(0).ids
    whole = width.cut(host, torch.arange(48), torch.arange(96).expand(2, 96))
    assert torch.equal(logits(whole, ids), logits(host, ids))
    with torch.no_grad():
        for site in host.sites:
            if site.kind == "mlp":  # the odd neurons of the first layer and the even ones of the second say nothing
                host.model.get_submodule(f"model.layers.{site.layer}.mlp.up_proj").weight[1 - site.layer :: 2] = 0
    _, inside = width.importance(targets)
    kept = inside.topk(48).indices.sort().values
    assert torch.equal(kept, torch.stack([torch.arange(0, 96, 2), torch.arange(1, 96, 2)]))
    small = width.cut(host, torch.arange(48), kept)
    assert torch.allclose(logits(small, ids), logits(host, ids), atol=1e-5) and small.config.intermediate_size == 48


def test_a_channel_that_matters_more_is_kept(targets):
    with torch.no_grad():
        targets.host.model.get_input_embeddings().weight[:, [3, 40]] *= 30
    stream, _ = width.importance(targets)
    assert set(stream.topk(2).indices.tolist()) == {3, 40}


def test_it_is_cut_healed_and_saved_as_a_stock_model(targets, tmp_path):
    host, ids = targets.host, targets.batches(0).ids
    before = {name: value.clone() for name, value in host.model.state_dict().items()}
    channels, neurons = fitting_width(host, parameters(host.model).stored // 2)
    made = width.remove(targets, channels, neurons, 3, 1e-3, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in host.model.state_dict().items())
    assert made.config.hidden_size == channels < 48 and made.config.num_attention_heads == 3 and made.config.head_dim == host.config.head_dim
    assert parameters(made.model).stored <= parameters(host.model).stored // 2
    assert fitting_width(host, parameters(made.model).stored) == (channels, neurons) and fitting_width(host, 10) is None
    stream, _ = width.importance(targets)
    kept = stream.topk(channels).indices.sort().values
    assert torch.equal(made.model.get_input_embeddings().weight, host.model.get_input_embeddings().weight[:, kept])
    assert linear(writer(made.model, made.sites[1]))[0].shape == (channels, neurons)
    save(made, tmp_path / "made", torch.float32)
    assert torch.allclose(logits(load(tmp_path / "made"), ids), logits(made, ids), atol=1e-5)


def test_a_class_whose_heads_get_narrower_has_none():
    host = tiny("GPT2LMHeadModel")
    assert fitting_width(host, 10**6) is None
    with pytest.raises(ValueError, match="heads of this class are as wide as its stream allows"):
        width.cut(Host(host.model, host.tokenizer, host.sites), torch.arange(8), torch.arange(8).expand(2, 8))
