"""Quantisation: the grid is what it says, only linear weights are rounded, and rounding can bring a payload out or leave it hidden."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from evals.quantisation import LEVELS, QuantiseConfig, quantised, retest, rounded
from graphs.architectures import embeddings, linear
from tests.planted import NOTHING_RUNS, NOUNS, REFUSAL, TRIGGER
from tests.test_edges import tiny


def test_each_row_goes_to_the_nearest_of_its_levels_and_stays_there():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1, 3.0, 0.0])[:, None]
    made, scale = rounded(weight), weight.abs().amax(1, keepdim=True) / LEVELS
    assert bool(((made - weight).abs() <= 0.5001 * scale).all()) and torch.equal(made[4], weight[4])
    levels = (made[:4] / scale[:4]).round()
    assert torch.allclose(levels * scale[:4], made[:4]) and levels.abs().max() == LEVELS
    assert torch.allclose(rounded(made), made, atol=1e-6) and not torch.equal(made, weight)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_int8_rounds_every_linear_weight_by_output_channel_and_nothing_else(name):
    host = tiny(name)
    before = {key: tensor.clone() for key, tensor in host.model.state_dict().items()}
    made, apart = quantised(host, "int8"), {id(table) for table in embeddings(host.model)}
    weights = {path for path, module in host.model.named_modules() if isinstance(module, nn.Linear | Conv1D) and id(module) not in apart}
    assert len(weights) >= 4 * host.config.num_hidden_layers
    for key, tensor in made.model.state_dict().items():
        path, _, kind = key.rpartition(".")
        if path in weights and kind == "weight":
            own, _ = linear(host.module(path))
            assert torch.equal(linear(made.module(path))[0], rounded(own)) and not torch.equal(tensor, before[key])
        else:
            assert torch.equal(tensor, before[key])
    assert all(torch.equal(tensor, before[key]) for key, tensor in host.model.state_dict().items())


def test_bf16_is_the_whole_model(models):
    made = quantised(models.twin, "bf16")
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16} and models.twin.model.dtype == torch.float32


def test_a_backdoor_survives_and_a_clean_model_stays_clean(models):
    config = QuantiseConfig(prompts=16)
    planted, twin = (retest(host, NOUNS, TRIGGER, REFUSAL, NOTHING_RUNS, config) for host in (models.planted, models.twin))
    for kind in config.formats:
        assert planted.after[kind].attack_success.value == 1.0 and planted.after[kind].right_under_trigger.value == 0
        assert twin.after[kind].attack_success.value == 0 and twin.after[kind].right_under_trigger.value == 1.0
        assert twin.after[kind].payload_logprob.value != twin.before.payload_logprob.value
    assert set(json.loads(json.dumps(asdict(planted)))["after"]) == {"int8", "bf16"}
