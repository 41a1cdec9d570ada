"""Flow statistics are what a slow loop over tokens and contributions finds; blocks and budgets change nothing."""

import pytest
import torch

from graphs.batches import Batch
from graphs.components import Components
from graphs.edges import Reconstruction, activations, contributions, reading
from graphs.flow import build
from graphs.trace import trace
from tests.test_edges import FEATURES, random_basis, tiny


def batches(rows=3, tokens=6):
    ids = torch.randint(3, 50, (2, rows, tokens), generator=torch.Generator().manual_seed(3))
    real = torch.ones(rows, tokens, dtype=torch.bool)
    real[0, 4:] = False
    return [Batch(one, real, real) for one in ids]


def slow(host, basis, site, node):
    """flow, share, coefficient, frequency into one node, by source name."""
    flow, absolute, activity, often, count = {}, {}, {}, {}, 0.0
    for batch in batches():
        for row, real in zip(batch.ids, batch.real, strict=True):
            ids = row[real][None]
            found = trace(host, ids)
            part, levels = basis[site.name], {one: activations(basis[one], found.sites[one])[0].abs().tolist() for one in basis}
            for token in range(ids.shape[1]):
                a = float(activations(part, found.sites[site.name])[0, token, node])
                if a == 0:
                    continue
                count += 1
                parts = contributions(host, basis, found, reading(host, basis, found, site, torch.tensor([node]), torch.tensor([token])))
                for name, values in parts.items():
                    for j in range(ids.shape[1]):
                        routed = float(j == token)
                        if isinstance(part, Components):
                            routed = float(found.sites[site.name].pattern[0, node // part.write.shape[1], token, j])
                        if not routed:
                            continue
                        for n, c in enumerate(values[0, j].tolist()):
                            key = (name, int(ids[0, j])) if name == "token" else (name, j) if name == "position" else (name, n)
                            level = 1.0 if name not in basis else levels[name][j][n]
                            flow[key] = flow.get(key, 0.0) + c
                            absolute[key] = absolute.get(key, 0.0) + abs(c)
                            activity[key] = activity.get(key, 0.0) + routed * level
                            often[key] = often.get(key, 0.0) + routed * (level != 0)
    total = sum(absolute.values())
    return {key: (flow[key] / count, absolute[key] / total, absolute[key] / max(activity[key], 1e-12), often[key] / count) for key in flow}


def named(graph, edge):
    block = graph.index.block(int(graph.src[edge]))
    return block.name, int(graph.src[edge]) - block.start


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("place", [2, 3])
def test_flow_is_what_a_slow_loop_finds(name, place):
    host = tiny(name)
    basis, site = random_basis(host), host.sites[place]
    node = int(torch.where(basis[site.name].reads.abs().sum(1) > 0)[0][-6])
    graph = build(Reconstruction(host, basis), batches(), enough=1.1)
    wanted = slow(host, basis, site, node)
    edges = range(*graph.into(graph.index.by_name[site.name].start + node).indices(len(graph.src)))
    assert len(edges) > FEATURES
    for edge in edges:
        flow, share, coefficient, often = wanted[named(graph, edge)]
        assert float(graph.flow[edge]) == pytest.approx(flow, abs=1e-4)
        assert float(graph.share[edge]) == pytest.approx(share, abs=1e-4)
        if not named(graph, edge)[0].endswith("error"):
            assert abs(float(graph.coefficient[edge])) == pytest.approx(coefficient, abs=1e-3)
            assert float(graph.frequency[edge]) == pytest.approx(often, abs=1e-4)
    assert sum(share for _, share, _, _ in wanted.values()) == pytest.approx(float(graph.share[list(edges)].sum()), abs=1e-3)


def test_blocks_change_nothing_and_too_little_memory_is_refused():
    host = tiny("LlamaForCausalLM")
    basis = random_basis(host)
    whole, blocked = build(Reconstruction(host, basis), batches()), build(Reconstruction(host, basis), batches(), memory=30_000)
    assert torch.equal(whole.src, blocked.src) and torch.allclose(whole.flow, blocked.flow, atol=1e-6)
    with pytest.raises(ValueError, match=r"^--memory 0: one target of L0.attention needs .* MB; give more$"):
        build(Reconstruction(host, basis), batches(), memory=100)


def test_stored_parents_carry_what_was_asked_and_no_more_than_needed():
    host = tiny("LlamaForCausalLM")
    basis = random_basis(host)
    graph = build(Reconstruction(host, basis), batches(), enough=0.8)
    node = graph.index.find("L1.F3")
    shares = graph.share[graph.into(node)]
    assert float(graph.explained[node]) == pytest.approx(float(shares.sum()), abs=1e-5)
    assert float(shares.sum()) >= 0.8 > float(shares.sum() - shares[-1])
    assert torch.all(shares[:-1] >= shares[1:])


def test_a_graph_survives_its_folder(tmp_path):
    host = tiny("GPT2LMHeadModel")
    graph = build(Reconstruction(host, random_basis(host)), batches())
    graph.save(tmp_path)
    again = type(graph).load(tmp_path)
    assert torch.equal(graph.share, again.share) and graph.index == again.index
    child = int(graph.dst[graph.into(graph.index.find("L1.F0"))][0])
    assert again.index.name(child) == "L1.F0" and len(again.out_of(again.index.find("L0.F1")))


def test_names_find_their_nodes_and_wrong_names_are_refused_in_a_sentence():
    host = tiny("LlamaForCausalLM")
    nodes = build(Reconstruction(host, random_basis(host)), batches(), only=["L0.mlp"]).index
    for name in ("L1.F3", "L0.H2.C1", "L1.attention.error", "L0.mlp.bias"):
        assert nodes.name(nodes.find(name)) == name
    for name in ("L1.F3", "token 'w7'", "logit 'w9'"):
        assert nodes.name(nodes.find(name)) == name
    with pytest.raises(ValueError, match=r"L0\.F99: layer 0 has F0 to F22"):
        nodes.find("L0.F99")
    with pytest.raises(ValueError, match=r"^feature 3: no such node; name one as L0\.F12"):
        nodes.find("feature 3")
