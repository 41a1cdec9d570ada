"""Edges are proven by intervention: under freezing, a nudged node moves every later drive and every logit by its edge."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from graphs.activations import record
from graphs.architectures import ARCHITECTURES, attention_components, neurons, sites
from graphs.dictionary import Dictionary, Gated, JumpReLU, Part, ReLU, TopK, skip
from graphs.edges import Reconstruction, activations, contributions, drives, errors, logit_reading, reading, virtual_weights
from graphs.host import Host
from graphs.replace import from_noise
from graphs.trace import FINAL, Frozen, trace

TOKENS, FEATURES = 7, 20
TYPES = {"LlamaForCausalLM": "llama", "ArceeForCausalLM": "arcee", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
         "Qwen3ForCausalLM": "qwen3", "SmolLM3ForCausalLM": "smollm3", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text",
         "GPT2LMHeadModel": "gpt2", "GPTNeoForCausalLM": "gpt_neo", "GPTNeoXForCausalLM": "gpt_neox", "OPTForCausalLM": "opt",
         "PhiForCausalLM": "phi", "Starcoder2ForCausalLM": "starcoder2"}
SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
           "gpt_neo": {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
           "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gemma2": {"head_dim": 8}, "gemma3_text": {"head_dim": 8},
           "qwen3": {"head_dim": 12}, "arcee": {"mlp_bias": True}, "llama": {"attention_bias": True}}


def tiny(name: str, seed: int = 0, **changes) -> Host:
    """A random model of the class whose activations are of order one."""
    kind = TYPES[name]
    allowed = AutoConfig.for_model(kind).to_dict()
    shape = {key: value for key, value in SHAPE.items() if key in allowed or kind not in ("gpt2", "gpt_neo")} | SPECIAL.get(kind, {}) | changes
    config = AutoConfig.for_model(kind, **shape)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert type(model).__name__ == name
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            spread = 0.7 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 and "emb" not in path and "wte" not in path else 0.3
            centre = 1.0 if parameter.ndim == 1 and ("norm" in path or "ln_" in path) and path.endswith("weight") and "gemma" not in kind else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + centre)
    plain = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    plain.pre_tokenizer = WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=plain)
    return Host(model, words, sites(model))


def random_dictionary(host, site, generator, gate=None):
    def draw(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    part = Part(draw(FEATURES, site.d_in, scale=site.d_in**-0.5), draw(FEATURES, scale=0.3), draw(FEATURES, site.d_out, scale=0.2), gate or ReLU())
    return Dictionary((part, skip(draw(site.d_out, site.d_in, scale=0.05), 3)), draw(site.d_out, scale=0.1))


def random_basis(host, gate=None):
    """Random dictionaries with a skip; attention components of which a third are missing, so that every site has an error."""
    generator, basis = torch.Generator().manual_seed(5), {}
    for site in host.sites:
        if site.kind == "mlp":
            basis[site.name] = random_dictionary(host, site, generator, gate)
        else:
            whole = attention_components(host.model, site)
            basis[site.name] = whole.keep(torch.rand(whole.bias.shape, generator=generator) > 0.33)
    return basis


def neuron_basis(host):
    return {site.name: neurons(host.model, site) if site.kind == "mlp" else
            attention_components(host.model, site) for site in host.sites}


def prompt():
    return torch.randint(3, 50, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def all_targets(basis, site):
    count = basis[site.name].count
    return torch.arange(count).repeat_interleave(TOKENS), torch.arange(TOKENS).repeat(count)


def frozen_drives(basis, site, found, x):
    """Drives when the site reads `x`, with its gates, patterns and scales as they were."""
    part, seen = basis[site.name], found.sites[site.name]
    if isinstance(part, Dictionary):
        linear = torch.cat([torch.nn.functional.linear(x, one.read, one.bias) for one in part.parts], -1)
        return linear * part.factor(seen.x)
    return part.activations(x, seen.pattern.expand(len(x), -1, -1, -1), None if seen.post is None else seen.post.expand(len(x), -1))


def prove(host, basis, sampled=100):
    """Nudge nodes one by one; returns the largest disagreement of drives, of logits, and the largest edge seen."""
    found = trace(host, prompt())
    adjacency = {site.name: contributions(host, basis, found, reading(host, basis, found, site, *all_targets(basis, site))) for site in host.sites}
    head = host.model.get_output_embeddings()
    tokens = torch.arange(TOKENS).repeat(3)
    vectors, bias = head.weight.detach()[3:6].repeat_interleave(TOKENS, 0), head.bias.detach()[3:6] if head.bias is not None else torch.zeros(3)
    logits = contributions(host, basis, found, logit_reading(host, found, vectors, tokens, bias.repeat_interleave(TOKENS)))
    frozen, generator = Frozen(host, found), torch.Generator().manual_seed(2)
    nudges = [("token", t, 0, "embedding", found.token[0, t]) for t in range(TOKENS)]
    nodes = []
    for site in host.sites:
        part, seen = basis[site.name], found.sites[site.name]
        missing, active = errors(part, seen)[0], activations(part, seen)[0]
        nudges += [(f"{site.name}.error", t, 0, site.name, missing[t]) for t in range(TOKENS)]
        nodes += [(site.name, t, n, site.name, active[t, n] * part.writes[n]) for n in range(part.count) for t in range(TOKENS) if active[t, n] != 0]
    nudges += [nodes[i] for i in torch.randperm(len(nodes), generator=generator)[:sampled]]
    rest, rest_logits = frozen.run({})
    assert torch.allclose(rest_logits, found.logits, atol=1e-4)
    given = {where: torch.zeros(len(nudges), TOKENS, host.config.hidden_size) for where in ("embedding", *basis)}
    for run, (_, token, _, where, vector) in enumerate(nudges):
        given[where][run, token] = vector
    read, moved_logits = frozen.run(given)

    def expected(edges):
        missing = torch.zeros(len(next(iter(edges.values()))))
        return torch.stack([edges[key][:, token, node] if key in edges else missing for key, token, node, _, _ in nudges])

    drive_gap = largest = 0.0
    for site in host.sites:
        moved = frozen_drives(basis, site, found, read[site.name]) - frozen_drives(basis, site, found, rest[site.name])
        edges = expected(adjacency[site.name])
        drive_gap = max(drive_gap, float((moved.transpose(1, 2).flatten(1) - edges).abs().max()))
        largest = max(largest, float(edges.abs().max()))
    change = (moved_logits - rest_logits)[:, :, 3:6].transpose(1, 2).flatten(1)
    return drive_gap, float((change - expected(logits)).abs().max()), largest


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nudged_nodes_move_drives_and_logits_by_their_edges(name):
    host = tiny(name)
    drive_gap, logit_gap, largest = prove(host, random_basis(host))
    assert drive_gap < 5e-4 and logit_gap < 1e-5 and largest > 0.1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_the_models_own_neurons_are_a_basis_without_error(name):
    host = tiny(name)
    basis, found = neuron_basis(host), trace(host, prompt())
    assert max(float(errors(basis[site.name], found.sites[site.name]).abs().max()) for site in host.sites) < 1e-5
    drive_gap, logit_gap, _ = prove(host, basis, 30)
    assert drive_gap < 5e-4 and logit_gap < 1e-5


@pytest.mark.parametrize("gate", [JumpReLU(torch.full((FEATURES,), 0.4)), TopK(4)])
def test_edges_hold_whatever_the_gate(gate):
    host = tiny("LlamaForCausalLM")
    drive_gap, logit_gap, _ = prove(host, random_basis(host, gate), 30)
    assert drive_gap < 5e-4 and logit_gap < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_contributions_sum_to_the_drive(name):
    host = tiny(name)
    basis, found = random_basis(host), trace(host, prompt())
    for site in host.sites:
        nodes, tokens = all_targets(basis, site)
        targets = reading(host, basis, found, site, nodes, tokens)
        total = sum(part.sum((1, 2)) for part in contributions(host, basis, found, targets).values()) + targets.constant
        assert torch.allclose(total, drives(basis[site.name], found.sites[site.name])[0, tokens, nodes], atol=1e-4)


def test_sites_of_a_parallel_block_do_not_feed_each_other():
    host = tiny("GPTNeoXForCausalLM")
    basis, found = random_basis(host), trace(host, prompt())

    def parents(site):
        return contributions(host, basis, found, reading(host, basis, found, site, *all_targets(basis, site)))

    assert host.sites[1].name == "L0.mlp" and "L0.attention" not in parents(host.sites[1]) and "L0.attention" in parents(host.sites[2])


def test_a_virtual_weight_is_the_edge_of_a_unit_activation_at_unit_scale():
    host = tiny("Qwen3ForCausalLM")
    basis, found = random_basis(host), trace(host, prompt())
    source, target = host.sites[1], host.sites[3]
    edges = contributions(host, basis, found, reading(host, basis, found, target, torch.tensor([4]), torch.tensor([5])))[source.name][0, 5]
    unit = edges / (activations(basis[source.name], found.sites[source.name])[0, 5] * found.sites[target.name].inverse[0, 5])
    weight = virtual_weights(host, target, basis[target.name], basis[source.name])[4]
    assert torch.allclose(unit[unit.isfinite()], weight[unit.isfinite()], atol=1e-5)


def test_gated_neurons_freeze_their_gate_into_the_drive():
    host = tiny("LlamaForCausalLM")
    part = neuron_basis(host)["L1.mlp"].parts[0]
    assert isinstance(part.gate, Gated)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(part.gate(part.drive(x)) @ part.write, host.module("model.layers.1.mlp")(x), atol=1e-5)


def test_an_unknown_class_is_refused_by_name():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM is not supported yet; choose from Llama"):
        sites(model)
    assert FINAL


def test_stand_in_attention_routes_its_own_components_inside_the_host(tiny_host):
    replacement = from_noise(tiny_host, 12, 0)
    stand_ins = {site.name: replacement.part(site) for site in replacement.sites if site.kind == "attention"}
    subject, ids = Reconstruction(tiny_host, replacement.basis(), stand_ins), torch.randint(3, 500, (1, TOKENS))
    found = subject.trace(ids)
    for site in tiny_host.sites[:3]:
        seen, part = found.sites[site.name], replacement.part(site)
        wanted = part(seen.x) if site.kind == "mlp" else part(seen.x, position_embeddings=record(tiny_host, ids).rotary, attention_mask=None)[0]
        assert torch.allclose(seen.y - errors(subject.basis[site.name], seen), wanted, atol=1e-5)
    own = Reconstruction(replacement.host(), replacement.basis())
    found = own.trace(ids)
    assert max(float(errors(own.basis[name], seen).abs().max()) for name, seen in found.sites.items()) < 1e-5
