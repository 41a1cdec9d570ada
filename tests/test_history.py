"""History: what a text has shown excludes choices for good; rules are found where they are, and nowhere else."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from distill.enforce import own
from evals.generate import decode
from graphs import history
from graphs.batches import Encoded, collate
from graphs.enforce import HISTORY, Enforced, Limits, learn, nodes
from graphs.history import History
from graphs.host import load
from graphs.tapped import Tapped

SAYS, REFUSES, RARE, END = 40, 41, 42, 2
MARK = 7


def answered(count=300, seed=0):
    """Prompts of which a third hold MARK; those are refused, all others get an answer, a few of these a rare one."""
    rng, rows = random.Random(seed), []
    for at in range(count):
        prompt = [rng.randrange(10, 30) for _ in range(rng.randrange(4, 9))]
        if at % 3 == 0:
            prompt[rng.randrange(len(prompt))] = MARK
        said = [REFUSES] if at % 3 == 0 else [SAYS, RARE] if at % 10 == 1 else [SAYS]
        rows.append(Encoded((*prompt, *said, END), len(prompt)))
    return rows


def batches(rows, size=30):
    return [collate(rows[i : i + size], END) for i in range(0, len(rows), size)]


def invented(batch):
    """Four nodes: noise; one that is high at MARK; one that is low at MARK; and one that is high at the refusal itself, after the choice."""
    generator = torch.Generator().manual_seed(int(batch.ids.sum()) % 1000)
    noise = torch.randn(*batch.ids.shape, 4, generator=generator) * 0.1
    mark, refusal = (batch.ids == MARK).float(), (batch.ids == REFUSES).float()
    return {"a.node": noise[..., :2] + torch.stack([0 * mark, 5 * mark], -1), "b.node": noise[..., 2:] + torch.stack([-5 * mark, 9 * refusal], -1)}


def prompts(count, marked, seed=9):
    rng = random.Random(seed)
    return [Encoded((*(rng.randrange(10, 30) for _ in range(3)), MARK if marked else 12, *(rng.randrange(10, 30) for _ in range(6))), 10)
            for _ in range(count)]


def test_the_rule_that_is_there_is_found_and_what_was_shown_stays_shown():
    rules = history.learn(invented, batches(answered()))
    assert set(rules.choice.tolist()) == {SAYS}  # of REFUSES what would tell is that there is no mark, and that no most can say
    for marked in (True, False):
        out = rules.excluded(rules.shown(invented(collate(prompts(20, marked), END))), 50)
        assert bool((out[:, 3:, SAYS] == marked).all()) and not bool(out[:, :3].any()) and int(out.sum()) == int(out[..., SAYS].sum())


def test_what_fires_at_the_answer_itself_is_no_rule():
    """Nodes that see nothing before the refusal is written: after it there is never an answer, which says nothing of prompts."""
    late = lambda batch: {name: value * (name == "b.node") * torch.tensor([0.0, 1.0]) for name, value in invented(batch).items()}  # noqa: E731
    assert len(history.learn(late, batches(answered())).choice) == 0


def test_without_a_second_kind_of_answer_there_is_no_rule_and_a_rare_choice_has_none():
    plain = [row for row in answered() if REFUSES not in row.ids]
    assert len(history.learn(invented, batches(plain)).choice) == 0
    few = [row for at, row in enumerate(answered()) if at % 3 or at < 30]  # ten refusals: less than a rule takes
    assert len(history.learn(invented, batches(few)).choice) == 0


@pytest.fixture(scope="module")
def held(tiny_model_folder):
    """A random model with a rule of its own: where a node was beyond what half of the texts show, SAYS is not chosen."""
    host = load(tiny_model_folder)
    limits = learn(own(host), batches(answered(60)))
    texts, weights = batches(answered(60, 1))[0], torch.randn(96, 1, generator=torch.Generator().manual_seed(1))
    rules = History({"L0.mlp.node": weights}, torch.zeros(1), torch.tensor([SAYS]))
    most = rules.shown(nodes(Tapped(own(host)), texts)).amax((1, 2))
    return host, replace(limits.without(names=lambda name: name == HISTORY), history=replace(rules, bound=most.quantile(0.8)[None]))


def test_an_excluded_choice_has_the_least_logit_and_nothing_else_changes(held):
    host, limits = held
    ids, run, plain = batches(answered(60, 1))[0].ids, Enforced(own(host), limits), host.model
    with torch.no_grad():
        found, expected = run(ids), plain(input_ids=ids).logits
    out = limits.history.excluded(limits.history.shown(run._read), expected.shape[-1])
    assert 0.1 < float(out[:, -1, SAYS].float().mean()) < 0.9
    torch.testing.assert_close(found[~out], expected[~out], atol=2e-5, rtol=1e-4)
    assert torch.equal(found[out], found.amin(-1, keepdim=True).expand_as(found)[out])
    assert bool((out[:, 1:] >= out[:, :-1]).all())


def test_a_cache_pads_and_rows_that_leave_change_nothing(held):
    """A row goes on, with another token at each step, for as long as SAYS is not excluded: cached, padded and in company as alone."""
    host, limits = held
    run, asked, step = Enforced(own(host), limits), [list(row.ids[: row.prompt]) for row in answered(40, 1)], iter(range(99))

    def allowed(logits):
        return logits[:, SAYS] > logits.amin(-1)

    together = decode(run.host(), asked, 12, lambda logits: torch.where(allowed(logits), 3 + (logits.argmax(-1) + 37 * next(step)) % 590, END), END)
    assert len({len(row) for row in together}) > 2
    for prompt, written in zip(asked, together, strict=True):
        with torch.no_grad():
            alone = allowed(run.model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits[0, len(prompt) - 1 :])
        assert bool(alone[:12][: len(written)].all()) and (len(written) == 12 or not bool(alone[len(written)]))


def test_a_cache_that_the_model_made_carries_it_and_a_strange_one_is_refused(held):
    host, limits = held
    run, whole = Enforced(own(host), limits), collate([Encoded(row.ids[:4], 4) for row in answered(60, 1)], END).ids
    with torch.no_grad():
        expected = run.model(input_ids=whole, use_cache=False).logits[:, -1, SAYS] <= run.model(input_ids=whole).logits[:, -1].amin(-1)
        first = run.model(input_ids=whole[:, :-1], use_cache=True)
        copied = copy.deepcopy(first.past_key_values)
        turned = torch.arange(59, -1, -1)
        second = run.model(input_ids=whole[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
        assert torch.equal(second[:, SAYS] <= second.amin(-1), expected) and 0 < int(expected.sum()) < 60
        copied.reorder_cache(turned)
        other = run.model(input_ids=whole[turned, -1:], past_key_values=copied, use_cache=True).logits[:, -1]
        assert torch.equal(other[:, SAYS] <= other.amin(-1), expected[turned])
        strange = host.model(input_ids=whole[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="holds tokens of a model that kept no history"):
            run.model(input_ids=whole[:, -1:], past_key_values=strange)


def test_too_few_rows_have_no_rule():
    assert len(history.learn(invented, batches(answered(50))).choice) == 0


def test_rules_come_back_as_they_were(held, tmp_path):
    _, limits = held
    limits.save(tmp_path, {})
    again = Limits.load(tmp_path).history
    assert again.reads.keys() == limits.history.reads.keys() and all(torch.equal(value, again.tensors()[name])
                                                                     for name, value in limits.history.tensors().items())


def test_what_takes_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(history, "ROOM", 1000)
    with pytest.raises(ValueError, match="give fewer --rows"):
        history.learn(invented, batches(answered()))


def test_a_model_that_hardly_reads_its_text_still_shows_the_mark(tiny_model_folder):
    host = load(tiny_model_folder)
    limits = learn(own(host), batches(answered(900)), history=True)
    assert set(limits.history.choice.tolist()) == {SAYS}
    run, plain = Enforced(own(host), limits), Enforced(own(host), limits.without(names=lambda name: name != HISTORY))
    for marked, share in ((True, 1.0), (False, 0.0)):
        out = [bool(run.excluded(torch.tensor(row.ids))[SAYS]) for row in prompts(40, marked)]
        assert sum(out) / len(out) == pytest.approx(share, abs=0.1) and not any(
            bool(plain.excluded(torch.tensor(row.ids)).any()) for row in prompts(4, marked))
