"""Components: any basis of a group computes the same layer; the canonical one is uncorrelated, sorted, and compiles as it is."""

import torch

from graphs.architectures import attention_components
from graphs.attention import set_components
from graphs.batches import Batch
from graphs.canonical import canonical
from graphs.replace import from_noise
from graphs.trace import trace
from tests.test_edges import prompt, tiny


def moment(x):
    return x.reshape(-1, x.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def test_the_canonical_basis_computes_the_same_layer_and_its_first_components_say_most():
    host = tiny("LlamaForCausalLM")  # four heads in two KV groups
    site = host.sites[2]
    found = trace(host, prompt()).sites[site.name]
    whole = attention_components(host.model, site)
    turned = whole.in_metric(moment(found.x))
    before, after = (one.activations(found.x, found.pattern) @ one.writes for one in (whole, turned))
    assert torch.allclose(before, after, atol=1e-5) and not torch.allclose(whole.read, turned.read, atol=1e-2)
    # what a group's components write on clean inputs is uncorrelated, largest first
    spread = torch.einsum("gcd,de,gke->gck", turned.read, moment(found.x), turned.read)
    diagonal = spread.diagonal(dim1=1, dim2=2)
    assert torch.allclose(spread, torch.diag_embed(diagonal), atol=1e-3 * float(diagonal.max()))
    assert torch.all(diagonal[:, :-1] >= diagonal[:, 1:] - 1e-4)


def test_truncating_the_canonical_basis_is_the_best_of_its_rank_on_clean_inputs():
    host = tiny("GPT2LMHeadModel")
    site = host.sites[0]
    x = trace(host, prompt()).sites[site.name].x
    whole = attention_components(host.model, site)
    turned = whole.in_metric(moment(x))
    first = torch.zeros_like(whole.bias, dtype=torch.bool)
    first[:, :3] = True

    def lost(components, kept):
        """Squared error of each head's map on clean inputs, before routing, biases aside."""
        small = components.keep(kept)
        return float(sum(((x[0] @ (a.T @ w - b.T @ v)) ** 2).sum() for a, w, b, v in zip(
            components.read, components.write, small.read, small.write, strict=True)))

    best = lost(turned, first)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.stack([torch.randperm(8, generator=generator) < 3 for _ in range(4)]) for _ in range(10)]
    others = [lost(components, kept) for components in (whole, turned) for kept in drawn]
    assert best > 0 and all(best <= other * 1.0001 for other in others)


def test_dropping_a_component_compiles_into_the_projections(tiny_host):
    replacement = from_noise(tiny_host, 8, 0)
    site = replacement.sites[0]
    part = replacement.part(site)
    components = attention_components(replacement.model, site, part)
    kept = torch.rand(components.bias.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    ids = torch.randint(3, 500, (1, 9), generator=torch.Generator().manual_seed(2))
    found = trace(replacement.host(), ids).sites[site.name]
    wanted = components.keep(kept).activations(found.x, found.pattern) @ components.keep(kept).writes
    set_components(part, components.keep(kept))
    assert torch.allclose(trace(replacement.host(), ids).sites[site.name].y, wanted, atol=1e-5)


@torch.no_grad()
def test_making_a_replacement_canonical_changes_names_not_outputs(tiny_host):
    replacement = from_noise(tiny_host, 8, 0)
    ids = torch.randint(3, 500, (4, 9), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(ids, dtype=torch.bool)
    values = replacement.part(replacement.sites[0]).v_proj
    before, read = replacement(ids), values.weight.clone()
    canonical(replacement, lambda _: Batch(ids, real, real), 2)
    assert torch.allclose(before, replacement(ids), atol=1e-4) and not torch.allclose(read, values.weight, atol=1e-2)


def test_a_dropped_component_stays_dropped_in_the_canonical_basis():
    host = tiny("GPT2LMHeadModel")
    site = host.sites[0]
    x = trace(host, prompt()).sites[site.name].x
    whole = attention_components(host.model, site)
    kept = torch.ones_like(whole.bias, dtype=torch.bool)
    kept[:, 5:] = False
    turned = whole.keep(kept).in_metric(moment(x))
    assert int((turned.read.abs().sum(2) == 0).sum()) == 4 * 3 and int((turned.write.abs().sum(2) == 0).sum()) == 4 * 3
