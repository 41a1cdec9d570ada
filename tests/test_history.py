"""History: what a text has shown excludes choices for good; rules are found where they are, and nowhere else."""

import random
from dataclasses import replace

import pytest
import torch

from distill.enforce import own
from evals.generate import decode
from graphs import history
from graphs.batches import Encoded, collate
from graphs.enforce import HISTORY, Enforced, Limits, learn
from graphs.history import History, both
from graphs.host import load

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


def test_the_rules_that_are_there_are_found_and_no_other():
    found = history.learn(invented, batches(answered()))
    sides = [name + str(int(place)) for name, places in found.reads.items() for place in places]
    rules = {(sides[int(read)], int(choice)) for read, choice in zip(found.read, found.choice, strict=True)}
    assert rules == {("a.node1", SAYS), ("b.node2", SAYS)}  # 2: the negative of b's first; what fires at the refusal says nothing of the prompt
    assert bool((found.bound > 1).all()) and bool((found.bound < 4).all())  # midway


def test_without_a_second_kind_of_answer_there_is_no_rule_and_a_rare_choice_has_none():
    plain = [row for row in answered() if REFUSES not in row.ids]
    assert len(history.learn(invented, batches(plain)).read) == 0
    few = [row for at, row in enumerate(answered()) if at % 3 or at < 30]  # ten refusals: less than a rule takes
    assert len(history.learn(invented, batches(few)).read) == 0


def test_what_was_shown_stays_shown():
    rules = history.learn(invented, batches(answered()))
    marked = collate([Encoded((12, MARK, 13, *(random.Random(i).randrange(10, 30) for _ in range(8))), 11) for i in range(20)], END)
    out = rules.excluded(rules.shown(invented(marked)), 50)
    assert bool(out[:, 1:, SAYS].all()) and not bool(out[:, 0].any()) and not bool(out[..., REFUSES].any())


@pytest.fixture(scope="module")
def held(tiny_model_folder):
    """A random model with a rule of its own: where a node was beyond what half of the texts show, SAYS is not chosen."""
    host = load(tiny_model_folder)
    limits = learn(own(host), batches(answered(60)))
    name, texts = "L0.mlp.node", batches(answered(60, 1))
    seen = both(_nodes(host, limits, texts[0].ids)[name])[..., 3].amax(1)
    rule = History({name: torch.tensor([3])}, torch.tensor([0]), seen.median()[None], torch.tensor([SAYS]))
    return host, replace(limits.without(names=lambda name: name == HISTORY), history=rule)


def _nodes(host, limits, ids):
    run = Enforced(own(host), replace(limits, history=History({"L0.mlp.node": torch.tensor([3])}, *History.nothing().tensors().values())))
    with torch.no_grad():
        run(ids)
    return run._read


def test_an_excluded_choice_has_the_least_logit_and_nothing_else_changes(held):
    host, limits = held
    ids, run, plain = batches(answered(60, 1))[0].ids, Enforced(own(host), limits), host.model
    with torch.no_grad():
        found, expected = run(ids), plain(input_ids=ids).logits
    out = limits.history.excluded(limits.history.shown(run._read), expected.shape[-1])
    assert 0.2 < float(out[:, -1, SAYS].float().mean()) < 0.8
    torch.testing.assert_close(found[~out], expected[~out], atol=2e-5, rtol=1e-4)
    assert torch.equal(found[out], found.amin(-1, keepdim=True).expand_as(found)[out])
    assert bool((out[:, 1:] >= out[:, :-1]).all())


def test_a_cache_pads_and_rows_that_leave_change_nothing(held):
    """A row goes on, with a token of its own at each step, for as long as SAYS is not excluded: cached, padded and in company as alone."""
    host, limits = held
    run, prompts, step = Enforced(own(host), limits), [list(row.ids[: row.prompt]) for row in answered(40, 1)], iter(range(99))

    def allowed(logits):
        return logits[:, SAYS] > logits.amin(-1)

    together = decode(run.host(), prompts, 12, lambda logits: torch.where(allowed(logits), 10 + 20 * next(step), END), END)
    assert len({len(row) for row in together}) > 2
    for prompt, written in zip(prompts, together, strict=True):
        assert written == [10 + 20 * at for at in range(len(written))]
        with torch.no_grad():
            alone = allowed(run.model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits[0, len(prompt) - 1 :])
        assert bool(alone[:12][: len(written)].all()) and (len(written) == 12 or not bool(alone[len(written)]))


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
    assert len(limits.history.choice) and {int(one) for one in limits.history.choice} <= {SAYS, REFUSES}
