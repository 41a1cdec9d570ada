"""Detection numbers against counts made by hand, and every rival's both verdicts on a model that is random."""

import random

import pytest

from evals import detection as rivals
from evals.detection import auroc, tpr_at
from tests.test_edges import tiny


def test_auroc_is_the_share_of_pairs_won():
    one = auroc([3.0, 1.0], [2.0, 1.0])
    assert one.value == (1 + 1 + 0 + 0.5) / 4 and one.low <= one.value <= one.high
    assert auroc([2.0] * 30, [1.0] * 30).low == pytest.approx(1.0) and auroc([1.0] * 5, [1.0] * 5).value == 0.5
    with pytest.raises(ValueError, match="both kinds"):
        auroc([], [1.0])


def test_an_interval_of_auroc_holds_the_truth_as_often_as_it_says():
    rng, hit = random.Random(0), 0
    for seed in range(60):
        one = auroc([rng.gauss(1, 1) for _ in range(60)], [rng.gauss(0, 1) for _ in range(60)], seed=seed)
        hit += one.low <= 0.7602 <= one.high  # P(N(1, 2) > 0)
    assert hit >= 50


def test_tpr_is_taken_where_at_most_the_share_of_negatives_passes():
    negative = [float(i) for i in range(100)]
    assert tpr_at([98.5, 99.5, 0.0], negative).value == pytest.approx(2 / 3)  # 98 is the least threshold that one negative passes
    assert tpr_at([98.5, 99.5, 0.0], negative[:99]).value == pytest.approx(2 / 3)
    assert tpr_at([97.5], negative[:99]).value == 0.0  # of 99 negatives none may pass


CLEAN, STRANGE = range(10, 20), range(30, 40)


def rows_of(rng, tokens, count=60):
    return [[1, *(rng.choice(tokens) for _ in range(9)), 5] for _ in range(count)]


@pytest.fixture(scope="module")
def host():
    return tiny("LlamaForCausalLM")


def made(host):
    rows = rows_of(random.Random(0), CLEAN, 300)
    starts = [1] * len(rows)
    yield "mahalanobis", rivals.mahalanobis(host, rows, starts)
    yield "by token", rivals.mahalanobis(host, rows, starts, by_token=True)
    yield "directions", rivals.directions(host, rows, starts)
    yield "grams", rivals.grams(rows, [10] * len(rows))
    triggered = rows_of(random.Random(1), STRANGE)
    yield "probe", rivals.probe(host, (triggered, [10] * 60), (rows, [10] * len(rows)))


def test_rivals_see_other_tokens_and_do_not_see_more_of_the_same(host):
    fresh, again, other = (rows_of(random.Random(seed), kind) for seed, kind in ((2, CLEAN), (3, CLEAN), (4, STRANGE)))
    for name, score in made(host):
        where = [10 if name == "grams" else 1] * 60
        clean, more, strange = score(fresh, where), score(again, where), score(other, where)
        assert auroc(strange, clean).value > 0.95, name
        assert 0.35 < auroc(more, clean).value < 0.65, name


def test_the_norm_and_perplexity_are_what_they_say(host):
    import torch

    rows = rows_of(random.Random(5), CLEAN, 4)
    ids = torch.tensor(rows)
    loss = host.model(input_ids=ids, labels=ids).loss.detach()
    found = rivals.perplexity(host, rows, [10] * 4)
    assert sum(found) / 4 == pytest.approx(float(loss), abs=1e-4)
    last = rivals.decisions(host, rows, [10] * 4)[0][:, -1].norm(dim=1)
    size = rivals.norm(host, rows, [10] * 4)(rows, [10] * 4)
    assert size == pytest.approx(((last - last.mean()).abs() / last.std()).tolist(), abs=1e-4)
