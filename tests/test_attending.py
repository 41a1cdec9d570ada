"""What pairs of nodes do to a head's scores sums to what the head's own pattern says, for every way that classes make scores."""

import pytest
import torch

from graphs.attending import ANY, CONSTANT, attending
from graphs.batches import Batch
from graphs.edges import Reconstruction
from tests.test_edges import TOKENS, random_basis, tiny

ROWS = 3


def rows():
    ids = torch.randint(3, 50, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, TOKENS - 2 :] = False
    return Batch(ids, real, real)


def own(subject, site, head):
    """Mean over tokens of sum_j (P - 1 / visible) log P, from the model's pattern alone."""
    seen, batch, total = subject.trace(rows().ids).sites[site.name], rows(), 0.0
    for row in range(ROWS):
        length = int(batch.real[row].sum())
        p = seen.pattern[row, head, :length, :length]
        visible = p > 0
        total += float(((p - visible / visible.sum(1, keepdim=True)) * p.clamp_min(1e-30).log().masked_fill(~visible, 0.0)).sum())
    return total / int(batch.real.sum())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel",
                                  "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM", "PhiForCausalLM", "Starcoder2ForCausalLM"])
def test_pairs_sum_to_the_heads_own_scores(name):
    host = tiny(name)
    subject = Reconstruction(host, random_basis(host))
    for site, head in ((host.sites[0], 1), (host.sites[2], 3)):
        found = attending(subject, site, head, [rows()], most=10**6)
        assert found.gain == pytest.approx(own(subject, site, head), abs=1e-4, rel=1e-4)
        assert sum(pair.gain for pair in found.pairs) == pytest.approx(found.gain, abs=1e-4, rel=1e-4)
        assert sum(pair.gain for pair in found.asking) == pytest.approx(found.gain, abs=1e-4)
        assert sum(pair.gain for pair in found.answering) == pytest.approx(found.gain, abs=1e-4)
        assert sum(pair.share for pair in found.pairs) == pytest.approx(1, abs=1e-4)


def test_a_pair_is_what_its_removal_takes():
    """Moving one token's embedding out of what a head's keys see moves its scores by that token's pairs."""
    host = tiny("LlamaForCausalLM")
    subject, site = Reconstruction(host, random_basis(host)), host.sites[0]
    one = torch.full((1, TOKENS), 14)
    one[0, -1] = 40
    real = torch.ones_like(one, dtype=torch.bool)
    found = attending(subject, site, 0, [Batch(one, real, real)], most=10**6)
    last = f"token {subject.host.tokenizer.decode([int(one[0, -1])])!r}"
    answered = sum(pair.gain for pair in found.pairs if pair.answers == last)
    attention = host.module(site.module)
    seen = subject.trace(one).sites[site.name]
    p = seen.pattern[0, 0]
    (cos, sin), (_, gain) = seen.rotary, (None, host.module(site.norm).weight.detach())

    def turn(v, at):
        half = len(v) // 2
        return v * cos[0, at] + torch.cat([-v[half:], v[:half]]) * sin[0, at]

    bias = attention.k_proj.bias[:8].detach()
    x, written = seen.x[0], gain * host.model.get_input_embeddings()(one)[0, -1].detach() * seen.inverse[0, -1]
    q = turn((attention.q_proj(x[-1])[:8]).detach(), TOKENS - 1)
    with_it, without = (turn(v, TOKENS - 1) for v in (attention.k_proj.weight[:8].detach() @ written + bias, bias))
    expected = float((p[-1, -1] - 1 / TOKENS) * (q @ (with_it - without)) * attention.scaling) / TOKENS
    assert answered == pytest.approx(expected, abs=1e-5)


def test_blocks_of_targets_change_nothing_and_errors_are_ratios():
    host = tiny("GPT2LMHeadModel")
    subject = Reconstruction(host, random_basis(host))
    whole = attending(subject, host.sites[2], 1, [rows()])
    parts = attending(subject, host.sites[2], 1, [rows()], memory=5000)
    assert [pair.asks for pair in whole.pairs] == [pair.asks for pair in parts.pairs]
    assert torch.allclose(torch.tensor([p.gain for p in whole.pairs]), torch.tensor([p.gain for p in parts.pairs]), atol=1e-6)
    assert all(pair.error > 0 for pair in whole.pairs) and whole.asking[0].answers == ANY
    assert any(CONSTANT in (pair.asks, pair.answers) for pair in attending(subject, host.sites[0], 0, [rows()], most=10**6).pairs)


def test_bent_scores_and_missing_heads_are_refused():
    host = tiny("Gemma2ForCausalLM")
    subject = Reconstruction(host, random_basis(host))
    with pytest.raises(ValueError, match="bends its attention scores"):
        attending(subject, host.sites[0], 0, [rows()])
    host = tiny("LlamaForCausalLM")
    with pytest.raises(ValueError, match="layer 0 has H0 to H3"):
        attending(Reconstruction(host, random_basis(host)), host.sites[0], 4, [rows()])
