"""Transcoders: sae_lens opens what we write; pruning is mean ablation made physical."""

import pytest
import torch

from graphs.transcoder import Transcoder, of_dictionary


@pytest.fixture(params=[0, 3], ids=["plain", "skip"])
def transcoder(request):
    part = Transcoder(20, 8, 6, torch.Generator().manual_seed(0), request.param)
    with torch.no_grad():
        part.b_enc.normal_(generator=torch.Generator().manual_seed(1))
        part.b_dec.normal_(generator=torch.Generator().manual_seed(2))
        part.mean.uniform_(generator=torch.Generator().manual_seed(3))
        if part.skip:
            part.skip_out.normal_(generator=torch.Generator().manual_seed(4))
    return part


def test_keeping_features_equals_closing_the_others_gates(transcoder):
    x, kept = torch.randn(5, 8), torch.tensor([1, 4, 7, 19])
    transcoder.gate = torch.zeros(20).index_fill(0, kept, 1.0)
    assert torch.allclose(transcoder.keep(kept)(x), transcoder(x), atol=1e-5)
    transcoder.gate = torch.ones(20)
    assert torch.allclose(transcoder.keep(torch.arange(20))(x), transcoder(x), atol=1e-6)


def test_what_is_saved_is_what_is_loaded(transcoder, tmp_path):
    transcoder.save(tmp_path / "t", "L0.mlp")
    again, x = Transcoder.load(tmp_path / "t"), torch.randn(5, 8)
    assert torch.equal(again(x), transcoder(x)) and torch.equal(again.mean, transcoder.mean)


def test_the_graphs_nodes_and_relu_units_compute_the_same(transcoder):
    x = torch.randn(5, 8)
    assert torch.allclose(transcoder.dictionary()(x), transcoder(x), atol=1e-5)
    units = of_dictionary(transcoder.dictionary())
    assert units.features == 20 + 2 * transcoder.skip and torch.allclose(units(x), transcoder(x), atol=1e-5)


@pytest.mark.slow
def test_sae_lens_opens_it_and_computes_the_same(transcoder, tmp_path):
    from sae_lens import SAE

    transcoder.save(tmp_path / "t", "L0.mlp")
    opened, x = SAE.load_from_disk(tmp_path / "t"), torch.randn(5, 8)
    assert torch.allclose(opened.encode(x), transcoder.encode(x), atol=1e-5)
    assert torch.allclose(opened(x), transcoder(x), atol=1e-5)
