"""The coarse basis: heads and whole layers as nodes; a dropped layer writes nothing, is gone from the checkpoint, and the rest is the circuit."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from distill import config
from distill.budget import bought, cost
from distill.compile import compile_circuit, home, legal_groups, parity
from evals.size import parameters
from graphs.absorb import absorbed, moments
from graphs.activations import first, hooks
from graphs.architectures import ARCHITECTURES, architecture
from graphs.batches import Batch
from graphs.curve import trace_curve
from graphs.fit import distill, quality
from graphs.host import load, save
from graphs.prune import PruneConfig, family, inside, kept_nodes, learn_gates, within
from graphs.replace import LAYERS, Replacement, from_noise
from graphs.scores import SCORES, gradients
from tests.test_edges import tiny
from tests.test_neurons import targets_of

NAMES = [name for name in ARCHITECTURES if not ARCHITECTURES[name].post]
DEPTH = 4


def deep(name, **changes):
    """A random model of four layers, of which some classes' attend in windows."""
    listed = {"GPTNeoForCausalLM": {"num_layers": DEPTH, "attention_types": [[["global", "local"], 2]], "window_size": 4},
              "GPT2LMHeadModel": {"n_layer": DEPTH}}.get(name, {"num_hidden_layers": DEPTH})
    return tiny(name, **listed, **changes)


def some(replacement):
    """Layers 0, 2 and 3; two heads of the first, and fewer of the others."""
    heads = {0: [0, 1], 1: [], 2: [1], 3: [0]}
    return {f"L{layer}.attention": torch.tensor(kept, dtype=torch.long) for layer, kept in heads.items()} | {LAYERS: torch.tensor([0, 2, 3])}


@torch.no_grad()
def skipping(host, ids, dropped):
    """The host's own logits with the given layers passed over: what enters comes out."""
    def skip(_module, args, kwargs, output):
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    with hooks() as handles:
        for layer in dropped:
            handles.append(host.module(f"{architecture(host.model).layers}.{layer}").register_forward_hook(skip, with_kwargs=True))
        return host.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_circuit_without_a_layer_is_the_model_that_skips_it(name):
    host = deep(name)
    whole, ids = from_noise(host, 0, 0, "kept", basis="layers"), targets_of(host).batches(0).ids
    assert torch.allclose(whole(ids), host.model(input_ids=ids).logits, atol=1e-4)
    every = {site: torch.arange(count) for site, count in whole.node_counts().items()} | {LAYERS: torch.tensor([0, 3])}
    small = whole.pruned(every)
    assert small.layers == (0, 3) and small.model.config.num_hidden_layers == 2 and len(small.sites) == 4
    assert torch.allclose(small(ids), skipping(host, ids, [1, 2]), atol=1e-4)
    again = small.pruned(inside(every, every | {LAYERS: torch.tensor([3])}, 1))
    assert again.layers == (3,) and torch.allclose(again(ids), skipping(host, ids, [0, 1, 2]), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_and_healed_circuit_is_its_own_class_again_with_fewer_layers(name, tmp_path):
    host = deep(name)
    targets, whole = targets_of(host), from_noise(host, 0, 0, basis="layers")
    kept, ids = some(whole), targets.batches(0).ids
    gates = {site: torch.zeros(count).index_fill(0, kept[site], 1.0) for site, count in whole.node_counts().items()}
    with torch.no_grad(), whole.gated(gates):
        closed = whole(ids)
    assert torch.allclose(whole.pruned(kept)(ids), closed, atol=1e-4)  # gates are what pruning makes physical
    small = absorbed(whole, kept, moments(whole, targets.batches, 1))
    losses = distill(targets, small, 6, 5e-3, 1.0, "heal")
    assert losses[-1] < losses[0]
    small.save(tmp_path / "circuit")
    back = Replacement.load(tmp_path / "circuit", host)
    assert back.layers == small.layers == (0, 2, 3) and torch.equal(back(ids), small(ids))
    compiled = compile_circuit(back)
    save(compiled, tmp_path / "model", torch.float32)
    again = load(tmp_path / "model")
    assert type(again.model).__name__ == name == home(host.model, "auto", neurons=True) and parity(small, again, targets.batches(0)) <= 1e-5
    assert again.config.num_hidden_layers == 3 and not any(f"{architecture(host.model).layers}.3." in key for key in again.model.state_dict())
    with torch.no_grad():  # and it generates: each layer has a place of its own in the cache
        out = again.model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
        assert torch.equal(out, small.model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False))


def test_sizes_fall_in_small_nested_steps_to_one_layer_and_so_do_costs(tiny_host):
    whole = from_noise(tiny_host, 0, 0, basis="layers")
    sizes = family(whole, legal_groups(tiny_host.model, "own", neurons=True))
    assert [(size.layers, size.heads) for size in sizes] == [(2, 3), (2, 2), (1, 2), (1, 1)] and sizes[0].share == 1
    order = {name: torch.rand(count) for name, count in whole.node_counts().items()}
    for larger, smaller in pairwise(sizes):
        wide, few = kept_nodes(order, larger), kept_nodes(within(order, kept_nodes(order, larger)), smaller)
        assert larger.share > smaller.share and all(set(few[name].tolist()) <= set(wide[name].tolist()) for name in order)
    (dropped,) = set(range(2)) - set(kept_nodes(order, sizes[-1])[LAYERS].tolist())
    assert len(kept_nodes(order, sizes[-1])[f"L{dropped}.attention"]) == 0
    stored = parameters(tiny_host.model).stored
    for budget in ({"target_ratio": 0.5}, {"target_params": 30_000}, {"target_nodes": 4}, {"target_memory": 0.25}):
        verb = config.Prune(basis="layers", **budget)
        costs = [cost(whole.pruned(kept_nodes(order, size)), kept_nodes(order, size), verb, stored) for size in sizes]
        chosen = sizes.index(bought(whole, verb, stored))
        assert costs == sorted(costs, reverse=True) and costs[chosen] <= verb.budget[1] < costs[chosen - 1]


def test_a_class_that_keeps_its_head_count_drops_layers_alone():
    host = deep("GPT2LMHeadModel")
    sizes = family(from_noise(host, 0, 0, basis="layers"), legal_groups(host.model, "own", neurons=True))
    assert [(size.layers, size.heads, size.share) for size in sizes] == [(left, 4, left / 4) for left in (4, 3, 2, 1)]


def silence(host, layer):
    """Let a layer write nothing."""
    with torch.no_grad():
        for name in (architecture(host.model).neurons[-1], f"{architecture(host.model).attention}.{architecture(host.model).output}"):
            for parameter in host.module(f"{architecture(host.model).layers}.{layer}.{name}").parameters():
                parameter.zero_()


@pytest.mark.parametrize("score", [name for name in SCORES if name != "random"])
def test_a_layer_that_writes_nothing_comes_last(score):
    host = deep("LlamaForCausalLM")
    silence(host, 1)
    found = SCORES[score](from_noise(host, 0, 0, "kept", basis="layers"), targets_of(host).batches, 1, False, 0)
    assert set(found) == {LAYERS, *(f"L{layer}.attention" for layer in range(DEPTH))}
    assert found[LAYERS][1] == 0 and int((found[LAYERS] > 0).sum()) == DEPTH - 1 and not found["L1.attention"].any()


def test_a_layers_gate_scales_what_both_of_its_sublayers_write():
    host = deep("GPTNeoXForCausalLM")  # a parallel block, with biases
    whole, batch = from_noise(host, 0, 0, "kept", basis="layers"), targets_of(host).batches(0)
    base = {name: torch.ones(count) for name, count in whole.node_counts().items()}

    def loss(gate):
        with torch.no_grad(), whole.gated(base | {LAYERS: torch.tensor([1, 1, gate, 1])}):
            labels = batch.ids[:, 1:].masked_fill(~batch.completion[:, 1:], -100)
            return float(nn.functional.cross_entropy(whole(batch.ids)[:, :-1].flatten(0, 1), labels.flatten()))

    slope = (loss(1.02) - loss(0.98)) / 0.04
    assert float(gradients(whole, batch, False)[LAYERS][2]) == pytest.approx(slope, rel=0.02)
    written = {}
    with hooks() as handles:
        for site in whole.sites:
            handles.append(whole.part(site).register_forward_hook(lambda _m, _i, out, name=site.name: written.update({name: first(out)})))
        with torch.no_grad(), whole.gated({LAYERS: torch.tensor([1.0, 1.0, 0.0, 1.0])}):
            shut = whole(batch.ids)
    assert torch.allclose(shut, skipping(host, batch.ids, [2]), atol=1e-4) and bool(written["L1.mlp"].any())


def test_gates_of_layers_are_learned_and_shut_the_one_that_writes_nothing():
    host = deep("LlamaForCausalLM")
    silence(host, 2)
    whole = from_noise(host, 0, 0, "kept", basis="layers")
    order, losses = learn_gates(targets_of(host), whole, PruneConfig(steps=12, target=0.75, learning_rate=1e-4, score_batches=1))
    assert len(losses) == 12 and len(order[LAYERS]) == DEPTH and int(order[LAYERS].argmin()) == 2


def test_a_part_whose_layer_was_numbered_anew_is_held_against_its_own():
    host = deep("LlamaForCausalLM")
    whole = from_noise(host, 0, 0, "kept", basis="layers")
    small = whole.pruned({name: torch.arange(count) for name, count in whole.node_counts().items()} | {LAYERS: torch.tensor([1, 3])})
    found = quality(host, small, targets_of(host).batches, 1)
    assert [site["name"] for site in found["sites"]] == ["L0.attention", "L0.mlp", "L1.attention", "L1.mlp"]
    assert all(site["fvu"] < 1e-6 for site in found["sites"])


def test_a_curve_opens_layers_with_their_heads():
    host = deep("LlamaForCausalLM")
    whole, start = from_noise(host, 0, 0, "kept", basis="layers"), targets_of(host).batches(0).ids[:, :2]
    ids = host.model.generate(start, max_new_tokens=12, do_sample=False, eos_token_id=None)  # text that the whole finds likely
    every = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        logits = host.model(input_ids=ids).logits
    order = {name: torch.rand(count) for name, count in whole.node_counts().items()}
    curve = trace_curve(whole, order, [Batch(ids, every, every)], [logits], (0.0, 0.5, 1.0))
    assert [point.nodes for point in curve.points] == [0, 6, 12] and curve.points[0].kl > curve.points[-1].kl == pytest.approx(0, abs=1e-5)
