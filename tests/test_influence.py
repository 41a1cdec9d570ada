"""Influence in one backward pass is what the dense adjacency matrix gives; scores are circuit-tracer's; the prompt graph is exact."""

import pytest
import torch

from graphs.edges import Reconstruction, activations, contributions, logit_reading, reading
from graphs.influence import influence, likely
from graphs.prompt_graph import attribute
from tests.test_edges import TOKENS, all_targets, neuron_basis, prompt, random_basis, tiny


def dense(subject, found, outcome):
    """circuit-tracer's way: the whole matrix, normalised, its powers summed; nodes in a fixed order (no biases)."""
    host, basis = subject.host, subject.basis
    keys = ["token", "position", *(name for site in host.sites for name in (site.name, f"{site.name}.error"))]
    sizes = [TOKENS * (basis[key].count if key in basis else 1) for key in keys]
    starts = dict(zip(keys, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    matrix = torch.zeros(sum(sizes) + len(outcome.vocabulary), sum(sizes) + len(outcome.vocabulary))

    def fill(rows, parts):
        for key in keys:
            if key in parts:
                matrix[rows, starts[key] : starts[key] + sizes[keys.index(key)]] = parts[key].flatten(1)

    for site in host.sites:
        nodes, tokens = all_targets(basis, site)
        targets = reading(host, basis, found, site, nodes, tokens)
        fill(starts[site.name] + tokens * basis[site.name].count + nodes, contributions(host, basis, found, targets))
    head = host.model.get_output_embeddings().weight.detach()
    chosen = list(outcome.vocabulary)
    ends = logit_reading(host, found, head[chosen] - head.mean(0), torch.full((len(chosen),), outcome.token), torch.zeros(len(chosen)))
    fill(torch.arange(sum(sizes), len(matrix)), contributions(host, basis, found, ends))
    inactive = torch.cat([torch.ones(2 * TOKENS, dtype=torch.bool)] + [one for site in host.sites for one in (
        (activations(basis[site.name], found.sites[site.name])[0] != 0).flatten(), torch.ones(TOKENS, dtype=torch.bool))])
    matrix[: len(inactive)][~inactive] = 0  # a node that is not active is no node of the graph
    normal = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp_min(1e-10)
    weights = torch.zeros(len(matrix))
    weights[sum(sizes):] = torch.tensor(outcome.weights)
    total, current = torch.zeros_like(weights), weights
    while bool(current.any()):
        current = current @ normal
        total = total + current
    wrong = torch.cat([torch.arange(starts[k], starts[k] + TOKENS) for k in keys if k.endswith("error")])
    inputs = float(total[: 2 * TOKENS].sum())
    fraction, out = 1 - normal[:, wrong].sum(1), total + weights
    return total, starts, inputs / (inputs + float(total[wrong].sum())), float((fraction * out).sum() / out.sum())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM"])
def test_one_pass_gives_the_influences_and_scores_of_the_dense_matrix(name):
    host = tiny(name)
    subject = Reconstruction(host, random_basis(host))
    found = subject.trace(prompt())
    outcome = likely(found)
    total, starts, replacement, completeness = dense(subject, found, outcome)
    flows = influence(subject, found, outcome)
    for site in host.sites:
        got = flows.nodes[site.name]
        assert torch.allclose(got.flatten(), total[starts[site.name] : starts[site.name] + got.numel()], atol=1e-4)
        assert torch.allclose(flows.error[site.name], total[starts[f"{site.name}.error"] :][:TOKENS], atol=1e-4)
    assert torch.allclose(flows.token, total[:TOKENS], atol=1e-4)
    assert flows.replacement == pytest.approx(replacement, abs=1e-4) and flows.completeness == pytest.approx(completeness, abs=1e-4)
    assert 0.05 < flows.replacement < 0.95


def test_without_errors_both_scores_are_one():
    host = tiny("LlamaForCausalLM")
    subject = Reconstruction(host, neuron_basis(host))
    found = subject.trace(prompt())
    flows = influence(subject, found, likely(found))
    assert flows.replacement == pytest.approx(1, abs=1e-4) and flows.completeness == pytest.approx(1, abs=1e-4)


def test_a_prompt_graph_holds_exact_edges_and_no_loose_ends():
    host = tiny("GPT2LMHeadModel")
    subject = Reconstruction(host, random_basis(host))
    graph = attribute(subject, prompt(), node_share=0.7)
    found = subject.trace(prompt())
    assert 0.7 <= graph.kept < 0.8 and {one.kind for one in graph.nodes} >= {"token", "feature", "attention", "error", "logit"}
    sites = {site.name: site for site in host.sites}
    checked = 0
    for edge in range(0, len(graph.src), max(1, len(graph.src) // 40)):
        source, target = graph.nodes[int(graph.src[edge])], graph.nodes[int(graph.dst[edge])]
        assert source.depth < target.depth
        if target.kind == "logit":
            continue
        name = target.name.split(".")[0] + (".mlp" if target.kind == "feature" else ".attention")
        place = int(target.name.split("F")[1]) if target.kind == "feature" else _component(target.name)
        targets = reading(host, subject.basis, found, sites[name], torch.tensor([place]), torch.tensor([target.token]))
        parts = contributions(host, subject.basis, found, targets)
        key = {"token": "token", "position": "position", "error": source.name}.get(source.kind) or (
            source.name.split(".")[0] + (".mlp" if source.kind == "feature" else ".attention"))
        column = 0 if source.kind in ("token", "position", "error") else (
            int(source.name.split("F")[1]) if source.kind == "feature" else _component(source.name))
        assert float(graph.weight[edge]) == pytest.approx(float(parts[key][0, source.token, column]), abs=1e-4)
        checked += 1
    assert checked > 5
    has_child, has_parent = set(graph.src.tolist()), set(graph.dst.tolist())
    for place, one in enumerate(graph.nodes):
        assert one.kind in ("token", "logit") or place in has_child
        assert one.kind not in ("feature", "attention") or place in has_parent


def _component(name):
    _, head, component = name.split(".")
    return int(head[1:]) * 8 + int(component[1:])


def test_a_lower_share_keeps_fewer_nodes():
    host = tiny("LlamaForCausalLM")
    subject = Reconstruction(host, random_basis(host))
    small, large = (attribute(subject, prompt(), node_share=share) for share in (0.3, 0.9))
    assert len(small.nodes) < len(large.nodes) and small.kept < large.kept
    assert len(attribute(subject, prompt(), node_share=0.9, most=5).nodes) <= 5 + TOKENS + 10
