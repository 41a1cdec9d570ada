"""Scores: useless nodes come last by every one of them; RelP is exact where freezing makes the model linear; outputs never change."""

import pytest
import torch

from evals.tasks import TASKS
from graphs.batches import Epochs, encode
from graphs.fit import set_means
from graphs.neurons import Neurons
from graphs.replace import from_noise
from graphs.scores import SCORES, gradients, linearised
from tests.test_edges import tiny


@pytest.fixture
def data(tiny_host):
    rows = TASKS["coding"].rows("trace", 64, seed=1)
    return Epochs(encode(tiny_host.tokenizer, [(row.prompt, row.completion) for row in rows]), 8, 1, 0)


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("basis", ["features", "neurons"])
@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("random", "frequency")])
def test_a_node_without_effect_comes_last(tiny_host, data, name, basis, components):
    made = from_noise(tiny_host, 16, 0, basis=basis)
    with torch.no_grad():
        for site in made.sites:
            if site.kind == "mlp":
                made.part(site).w_dec[5] = 0.0
            else:
                made.part(site).o_proj.weight[:, :16] = 0.0  # the first head
    for site, found in SCORES[name](made, data, 2, components, 0).items():
        first = [5] if site.endswith("mlp") else list(range(16)) if components else [0]
        assert not found[first].any() and int((found > 0).sum()) > len(found) / 2


def test_frequency_counts_tokens(tiny_host, data):
    made, batch = from_noise(tiny_host, 16, 0), data(0)
    found = SCORES["frequency"](made, data, 1, False, 0)
    for part in made.transcoders().values():
        part.watch = True
    made(batch.ids)
    for name, part in made.transcoders().items():
        assert torch.allclose(found[name], (part.last[batch.real] > 0).float().mean(0))


@pytest.mark.parametrize("basis", ["features", "neurons"])
def test_linearised_changes_gradients_and_no_output(tiny_host, data, basis):
    made, batch = from_noise(tiny_host, 16, 0, basis=basis), data(0)
    with torch.no_grad():
        before = made(batch.ids)
        with linearised(made):
            assert torch.allclose(made(batch.ids), before, atol=1e-4)
        assert torch.equal(made(batch.ids), before)
    plain = gradients(made, batch, False)
    with linearised(made):
        held = gradients(made, batch, False)
    assert any(not torch.allclose(plain[name], held[name], rtol=1e-3, atol=1e-9) for name in plain)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Starcoder2ForCausalLM", "SmolLM3ForCausalLM", "GPTNeoForCausalLM", "OPTForCausalLM",
                                  "GPTNeoXForCausalLM"])
@torch.no_grad()
def test_no_class_sees_more_when_it_is_linearised(name):
    window = {"window_size": 4} if "Neo" in name else {"sliding_window": 4}
    changes = window | ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2} if "Smol" in name else {})
    host = tiny(name, **changes) if name not in ("OPTForCausalLM", "GPTNeoXForCausalLM") else tiny(name)
    made, ids = from_noise(host, 0, 0, basis="neurons"), torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(0))
    before = made(ids)
    with linearised(made):
        assert torch.allclose(made(ids), before, atol=1e-4)


@torch.no_grad()
def test_held_scales_and_patterns_make_a_nodes_gradient_its_exact_effect(tiny_host, data):
    """With norms and patterns held, the logits are linear in the last layer's gates: the gradient is the whole effect of closing one."""
    made, batch = from_noise(tiny_host, 16, 0), data(0)
    set_means(made, data, 1)
    part = made.transcoders()["L1.mlp"]
    head = made.model.get_output_embeddings().weight
    stream, final = {}, made.model.model.norm
    handle = final.register_forward_hook(lambda _m, args, out: stream.update(x=args[0], y=out))
    part.watch = True
    made(batch.ids)
    handle.remove()
    inverse = torch.rsqrt(stream["x"].square().mean(-1) + final.variance_epsilon)
    moved = (part.last[..., 3] - part.mean[3])[..., None] * part.w_dec[3]  # what the gate scales
    expected = (moved * final.weight * inverse[..., None]) @ head.T
    with torch.enable_grad(), linearised(made):
        gate = torch.ones(16, requires_grad=True)
        with made.gated({"L1.mlp": gate}):
            logits = made(batch.ids)
        for row, token, word in ((0, 3, 7), (2, 5, 100)):
            (slope,) = torch.autograd.grad(logits[row, token, word], gate, retain_graph=True)
            assert float(slope[3]) == pytest.approx(float(expected[row, token, word]), rel=1e-3, abs=1e-6)


def test_a_gated_neurons_two_factors_get_half_each(tiny_host):
    part = Neurons.of(tiny_host.model, tiny_host.sites[1])
    x = torch.randn(4, 48, requires_grad=True)
    part.linear = True
    a = part.encode(x)
    (slope,) = torch.autograd.grad(a[:, 3].sum(), x)
    # each factor is homogeneous of degree one under the ratio rule, so half of each sums to the activation itself
    assert torch.allclose((slope * x).sum(1), a[:, 3].detach(), atol=1e-4)
