"""Running by edges: with all of them it is the compiled checkpoint; without one, its target alone moves, by exactly what the edge carried."""

import pytest
import torch

from distill.compile import compile_circuit
from evals.generate import decode, greedy
from graphs.architectures import norm
from graphs.edge_run import SPARSE, EdgeModel
from graphs.edges import Reconstruction, activations, contributions, logit_reading, reading
from graphs.replace import from_noise
from tests.test_edges import prompt, tiny


def circuit(name="LlamaForCausalLM", basis="features", **changes):
    """A random pruned circuit of two layers and grouped queries, with biases and skips that are not zero."""
    made = from_noise(tiny(name, **changes), 12, 0, skip=0 if basis == "neurons" else 2, basis=basis)
    with torch.no_grad():
        for part in made.transcoders().values():
            for weight in (part.b_enc, part.b_dec, part.skip_out):
                if weight is not None and weight.requires_grad:
                    weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return made.pruned({name: torch.arange(count - (count > 4)) for name, count in made.node_counts().items()}).eval()


def ids(rows=3):
    return torch.randint(3, 50, (rows, 9), generator=torch.Generator().manual_seed(2))


def random_cut(run, share):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(reader.kept.shape, generator=generator) < share for name, reader in run.readers.items()}


@torch.no_grad()
@pytest.mark.parametrize("routing", (False, True))
@pytest.mark.parametrize("name", ("LlamaForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM"))
def test_with_all_edges_it_is_the_compiled_checkpoint(name, routing):
    whole = circuit(name)
    wanted, run = compile_circuit(whole).model(input_ids=ids()).logits, EdgeModel(whole, routing)
    assert (run(ids()) - wanted).abs().max() < 1e-5 and (run.host().model(input_ids=ids()).logits - wanted).abs().max() < 1e-5
    assert len(run.readers) == (9 if routing else 5)
    assert (whole(ids()) - wanted).abs().max() < 1e-5  # the circuit it was made of is as it was


@torch.no_grad()
@pytest.mark.parametrize("changes", ({"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}))
def test_queries_may_be_grouped_and_tables_tied(changes):
    whole = circuit(**changes)
    assert (EdgeModel(whole)(ids()) - compile_circuit(whole).model(input_ids=ids()).logits).abs().max() < 1e-5


@torch.no_grad()
def test_gated_neurons_read_by_edges_too():
    whole = circuit(basis="neurons")
    assert (EdgeModel(whole)(ids()) - compile_circuit(whole, "own").model(input_ids=ids()).logits).abs().max() < 1e-5


def test_norms_after_sublayers_are_refused():
    with pytest.raises(ValueError, match="an edge has no fixed weight"):
        EdgeModel(from_noise(tiny("Gemma3ForCausalLM"), 4, 0))


def drives(run, text):
    for reader in run.readers.values():
        reader.watch = True
    run(text)
    return {name: reader.last for name, reader in run.readers.items()}


@torch.no_grad()
@pytest.mark.parametrize("target", ("L1.mlp", "L1.attention", "logits"))
def test_a_cut_edge_takes_from_its_target_what_it_carried_and_nothing_from_others(target):
    whole, text, at = circuit(), prompt(), 5
    subject = Reconstruction(whole.host(), whole.basis())
    found, last = subject.trace(text), torch.tensor([text.shape[1] - 1])
    before = drives(EdgeModel(whole), text)
    for source, node in (("L0.mlp", 11), ("L0.attention", 6), ("L0.mlp.bias", 0), ("token", int(text[0, -1]))):  # 11: a skip's, never silent
        run = EdgeModel(whole)
        column = run.columns()[source.removesuffix(".bias")]
        place = column.stop - 1 if source.endswith("bias") else column.start + node
        kept = {name: torch.ones_like(reader.kept) for name, reader in run.readers.items()}
        kept[target][at, place] = False
        after, carried = drives(run.keep(kept), text), flow(subject, found, target, at, last, source, node)
        moved = before[target] - after[target]
        assert abs(carried) > 1e-5 and moved[0, -1, at] == pytest.approx(carried, abs=1e-5)
        moved[..., at] = 0
        assert moved.abs().max() < 1e-6
        assert all(torch.allclose(drive, before[name], atol=1e-6) for name, drive in after.items() if name.startswith("L0"))


def flow(subject, found, target, at, last, source, node):
    """What `graphs.edges` says that the edge carries at the last token."""
    host, basis = subject.host, subject.basis
    if target == "L1.attention":  # a value is read where its token stands, before any head looks
        name, seen = source.removesuffix(".bias"), found.sites.get(source)
        written = host.model.get_input_embeddings().weight[node] if source == "token" else (
            basis[name].writes[node] if seen else basis[name].constant)
        active = activations(basis[name], seen)[0, -1, node] if seen else 1.0
        pulled = norm(host.model, host.site(target).norm).pulled(basis[target].reads[at])  # the first head of the first group
        return float(found.sites[target].inverse[0, -1] * (pulled @ written) * active)
    if target == "logits":
        rows = host.model.get_output_embeddings().weight
        read = logit_reading(host, found, (rows - rows.mean(0))[[at]], last, torch.zeros(1))
    else:
        read = reading(host, basis, found, host.site(target), torch.tensor([at]), last)
    return float(contributions(host, basis, found, read)[source][0, -1, node if source in basis else 0])


@torch.no_grad()
def test_a_cut_edge_is_held_at_its_mean():
    run = EdgeModel(circuit())
    reader = run.readers["L1.mlp"]
    reader.mean.uniform_(generator=torch.Generator().manual_seed(4))
    kept = {"L1.mlp": torch.ones_like(reader.kept)}
    kept["L1.mlp"][2, 60] = False
    virtual, held, whole = reader.virtual()[0], run.keep(kept).readers["L1.mlp"].weights(), EdgeModel(circuit()).readers["L1.mlp"].weights()
    shift = held.shift - whole.shift
    assert shift[2] == pytest.approx(float(virtual[2, 60] * reader.mean[60])) and shift.abs().sum() == pytest.approx(float(shift[2].abs()))


@torch.no_grad()
@pytest.mark.parametrize("share", (0.6, SPARSE / 2))
def test_fixed_weights_dense_or_compressed_compute_the_same(share):
    run = EdgeModel(circuit())
    live = run.keep(random_cut(run, share))(ids())
    run.fix()
    assert {reader.fixed.inner.layout for reader in run.readers.values() if reader.sites} == {torch.strided if share > SPARSE else torch.sparse_csr}
    assert torch.allclose(run(ids()), live, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("share", (1.0, 0.5, SPARSE / 2))
def test_what_it_writes_with_a_cache_in_batches_is_what_it_writes_without(share):
    run = EdgeModel(circuit())
    run.keep(random_cut(run, share))
    host, prompts = run.host(), [[5, 9, 11], [7], [30, 8, 9, 10, 41, 3]]
    host.tokenizer.eos_token = "w2"
    together = decode(host, prompts, 8, greedy, None)
    for row, wanted in zip(prompts, together, strict=True):
        text = list(row)
        for _ in range(8):
            text.append(int(host.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert text[len(row):] == wanted


@torch.no_grad()
def test_disk_keeps_cuts_means_and_weights(tmp_path):
    run = EdgeModel(circuit())
    run.keep(random_cut(run, 0.5)).readers["L0.mlp"].mean.fill_(0.2)
    for parameter in run.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.1)
    run.save(tmp_path)
    again = EdgeModel(circuit())
    again.restore(tmp_path)
    assert torch.equal(again(ids()), run(ids())) and not torch.allclose(again(ids()), EdgeModel(circuit())(ids()), atol=1e-3)


def test_gradients_are_those_of_the_run():
    run = EdgeModel(circuit())
    run.keep(random_cut(run, 0.5))
    weight = run.model.get_submodule(run.sites[1].module).part.w_dec
    run(ids()).square().sum().backward()
    step = 1e-3 * weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight += step
        up = run(ids()).square().sum()
        weight -= 2 * step
        down = run(ids()).square().sum()
    assert float(up - down) == pytest.approx(2e-3 * float(weight.grad.norm()), rel=0.05)
