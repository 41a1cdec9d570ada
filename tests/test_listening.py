"""What is heard of a model's passes is what a traced run says of the same tokens; sums over all targets are those of the plain definition."""

import random
from dataclasses import replace

import pytest
import torch

from graphs.architectures import ARCHITECTURES, attention_components, neurons
from graphs.batches import Encoded, collate, left_padded
from graphs.dictionary import nothing
from graphs.edges import Reconstruction
from graphs.familiar import CHOICE, Here, here, parents_of
from graphs.listening import Listener, read_on
from graphs.monitor import Monitor, fit
from graphs.prompts import padded
from graphs.refusal import MonitorProcessor
from graphs.replace import from_noise
from graphs.strangeness import STRONGEST
from tests.test_edges import random_dictionary, tiny


def subject_of(name: str) -> Reconstruction:
    """A random model of a class by its own nodes, or without neurons where they have no fixed write vectors."""
    host = tiny(name)
    return Reconstruction(host, {site.name: attention_components(host.model, site) if site.kind == "attention" else (
        nothing(site.d_in, site.d_out) if "Gemma" in name else neurons(host.model, site)) for site in host.sites})


def with_stand_ins() -> Reconstruction:
    """A random model read by another one's attention, and by random dictionaries, so that every site has an error."""
    host = tiny("LlamaForCausalLM")
    made = from_noise(host, 16, 0)
    made.eval()
    generator = torch.Generator().manual_seed(3)
    basis = {site.name: part if site.kind == "attention" else random_dictionary(host, site, generator) for site, part in zip(
        host.sites, made.basis().values(), strict=True)}
    return Reconstruction(host, basis, dict(made.attention()))


def some_rows(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 50) for _ in range(rng.randrange(5, 14))] for _ in range(count)]


def traced(subject: Reconstruction, rows: list[list[int]]) -> Here:
    """The rows' last tokens, from a run that keeps everything."""
    batch = padded(rows, 0)
    return here(subject, parents_of(subject), subject.trace(batch.ids), torch.arange(batch.ids.shape[1]) == batch.last[:, None])


def alike(found: Here, expected: Here) -> None:
    """Both to 1e-5 of what is of order one."""
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.choice, expected.choice)
    tables = ((found.scale, expected.scale), (found.active, expected.active), (found.factor, expected.factor))
    tables = ((found.scale, expected.scale), (found.active, expected.active), (found.factor, expected.factor))
    for one, other in ((found.level, expected.level), (found.vectors, expected.vectors), *((a[name], b[name]) for a, b in tables for name in b)):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "stand-ins"])
def test_what_is_heard_of_a_pass_is_what_a_trace_says(name):
    subject, rows = with_stand_ins() if name == "stand-ins" else subject_of(name), some_rows(4)
    with torch.no_grad():
        found = read_on(Listener(subject, parents_of(subject)), rows, 2)
    assert len(found) == 3
    for seen in found:
        alike(seen, traced(subject, rows))
        rows = [[*row, int(token)] for row, token in zip(rows, seen.choice, strict=True)]


def test_reading_on_ends_with_the_context_and_leaves_no_hook():
    subject = subject_of("LlamaForCausalLM")
    listener, limit = Listener(subject, parents_of(subject)), subject.host.config.max_position_embeddings
    assert len(read_on(listener, [[3] * limit], 2)) == 1 and len(read_on(listener, [[3] * (limit - 1)], 5)) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.host.model.modules())
    ids, mask = left_padded([[5, 6], [7]], 0)
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[1, 1], [0, 1]]


def test_components_of_another_basis_are_refused():
    subject = subject_of("LlamaForCausalLM")
    site = subject.host.sites[0]
    turned = subject.basis[site.name].in_metric(torch.diag(torch.linspace(1, 2, site.d_in)))
    with pytest.raises(ValueError, match="another basis than the attention module"):
        Listener(Reconstruction(subject.host, {**subject.basis, site.name: turned}), parents_of(subject))


def plain(monitor: Monitor, seen: Here, token: int) -> list[float]:
    """The definition, target by target and parent by parent."""
    learnt, paired = monitor.learnt, set()
    there = [i for i, value in enumerate(seen.level[token].tolist()) if abs(value) > float(learnt.present[i])]
    for one in there:
        if any(bool(learnt.pairs[one, other]) for other in there):
            paired.add(one)
    shares = []
    for block in monitor.blocks:
        reader, known = block.reader, block.known
        if reader.name == CHOICE:
            targets = [(int(seen.choice[token]), 1.0)]
        else:
            wrote = [(abs(float(a)) * float(monitor.subject.basis[reader.name].writes[t].norm()), t) for t, a in enumerate(
                seen.active[reader.name][token]) if float(a) != 0]
            targets = [(t, abs(float(seen.factor[reader.name][token, t]))) for _, t in sorted(wrote, reverse=True)[:STRONGEST]]
        whole, sums, scale = 0.0, [0.0, 0.0, 0.0], float(seen.scale[reader.name][token])
        for target, gate in targets:
            row = int(known.rows[target])
            for column in range(reader.parents + reader.others):
                node = column < reader.parents
                value = scale * float(seen.level[token, column] if node else seen.vectors[token, column - reader.parents] @ reader.pulled[target])
                weight = gate * abs(float(reader.weights[target, column]) if node else 1.0)
                size = abs(value) * weight
                odd = bool(known.unfamiliar[row, column]) or (column == reader.parents and not bool(learnt.known[seen.ids[token]]))
                beyond = max(0.0, value - float(known.high[row, column]), float(known.low[row, column]) - value)
                whole += size
                sums[0] += size * odd
                sums[1] += 0.0 if odd else min(size, beyond * weight)
                sums[2] += size * (not odd and node and column in paired)
        shares.append([one / max(whole, 1e-9) for one in sums])
    return [sum(column) / len(shares) for column in zip(*shares, strict=True)]


def stricter(monitor: Monitor) -> Monitor:
    """Pairs drawn at random, ranges a fifth as wide and some parents unfamiliar, so that every part has something to add up."""
    generator = torch.Generator().manual_seed(5)

    def few(shape: torch.Size) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.02

    pairs = few(monitor.learnt.pairs.shape)
    blocks = {}
    for name, one in monitor.learnt.blocks.items():
        odd = one.unfamiliar | few(one.unfamiliar.shape)
        spread = ((one.high - one.low) / 10).masked_fill(odd, torch.inf)
        blocks[name] = replace(one, low=one.mean - spread, high=one.mean + spread, unfamiliar=odd)
    return replace(monitor, learnt=replace(monitor.learnt, pairs=pairs | pairs.T, blocks=blocks))


@pytest.mark.parametrize("stand_ins", [False, True])
def test_parts_are_those_of_the_plain_definition(stand_ins):
    subject = with_stand_ins() if stand_ins else subject_of("LlamaForCausalLM")
    clean = [Encoded(tuple(row), 3) for row in some_rows(40, 1)]
    monitor = fit(subject, [collate(clean[i : i + 8], 0) for i in range(0, 40, 8)], ahead=1)
    monitor = stricter(monitor)
    rows = [[token % 20 + 30 for token in row] for row in some_rows(4, 2)]
    steps = read_on(monitor.listener, rows, 1)
    for step, seen in enumerate(steps):
        found = monitor.parts(seen)
        assert bool((found > 1e-3).any(0).all())
        for token in range(len(rows)):
            assert found[token].tolist() == pytest.approx(plain(monitor, seen, token), abs=1e-5)
            assert monitor.score(rows)[token].tokens[step].parts == pytest.approx(found[token].tolist(), abs=1e-7)


def test_a_processor_hears_while_the_model_writes_what_score_reads_afterwards():
    from transformers import LogitsProcessorList

    subject = subject_of("LlamaForCausalLM")
    clean = [Encoded(tuple(row), 3) for row in some_rows(40, 1)]
    monitor = fit(subject, [collate(clean[i : i + 8], 0) for i in range(0, 40, 8)], ahead=0)
    monitor = stricter(monitor).calibrate([-1e9] * 99, 0.01)
    rows, model, heard = some_rows(3, 4), subject.host.model, []
    ids, mask = left_padded(rows, 0)
    for cache in (True, False):
        with MonitorProcessor(monitor, "tell", steps=3, tell=lambda row, one: heard.append((row, one))) as processor:
            out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=cache, eos_token_id=None,
                                 logits_processor=LogitsProcessorList([processor, lambda ids, scores: (processor.flagged.clear(), scores)[1]]))
        for step in range(3):
            texts = [[*row, *out[i, ids.shape[1] : ids.shape[1] + step].tolist()] for i, row in enumerate(rows)]
            for (row, one), expected in zip(heard[3 * step : 3 * step + 3], monitor.score(texts, explain=True), strict=True):
                assert one.tokens[0].position == len(texts[row]) - 1 and one.reason.target == expected.reason.target
                assert one.tokens[0].parts == pytest.approx(expected.tokens[0].parts, abs=1e-5)
        heard.clear()
    with MonitorProcessor(monitor, "tell", tell=lambda row, one: heard.append((row, one))) as processor:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None,
                       logits_processor=LogitsProcessorList([processor]))
    assert len(heard) == 3 and processor.looked == 3 and processor.steps == 1 and processor.listener.resting
    with pytest.raises(ValueError, match="heard nothing of this text"):
        MonitorProcessor(monitor)(ids, torch.zeros(3, 50))
    with MonitorProcessor(monitor, steps=2) as processor, pytest.raises(ValueError, match="rows are not those of the last look"):
        for turned in (ids, ids.flip(0)):
            model(input_ids=turned)
            processor(turned, torch.zeros(3, 50))
