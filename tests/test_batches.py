"""Batches: a function of the step; padding never changes what real tokens see."""

import torch

from graphs.batches import Encoded, Epochs, Stream, collate, encode, packed

ROWS = [Encoded(tuple(range(2, 2 + n)), 2) for n in (3, 9, 4, 7, 5, 6, 8, 10, 3, 4)]


def test_a_batch_is_a_function_of_the_step():
    one, two = Epochs(ROWS, 3, 1, seed=4), Epochs(ROWS, 3, 1, seed=4)
    order = [9, 0, 4, 9, 2, 1]
    for step in order:
        assert torch.equal(one(step).ids, two(step).ids)
    assert any(not torch.equal(one(s).ids, Epochs(ROWS, 3, 1, seed=5)(s).ids) for s in range(3))


def test_an_epoch_shows_every_row_at_most_once():
    epochs = Epochs(ROWS, 2, 1, seed=0)
    seen = [tuple(row[real].tolist()) for step in range(epochs.per_epoch) for row, real in zip(epochs(step).ids, epochs(step).real, strict=True)]
    assert sorted(seen) == sorted(row.ids for row in ROWS)


def test_labels_hide_pads_and_completion_starts_after_the_prompt():
    batch = collate([Encoded((0, 5, 6, 1), 2), Encoded((0, 5, 1), 2)], pad=1)
    assert batch.labels.tolist() == [[0, 5, 6, 1], [0, 5, 1, -100]]
    assert batch.completion.tolist() == [[False, False, True, True], [False, False, True, False]]


def test_padding_does_not_change_logits(tiny_host):
    rows = encode(tiny_host.tokenizer, [("def f(x):\n", "    return x\n"), ("a", "b")])
    both, alone = collate(rows, 1), collate(rows[1:], 1)
    with torch.no_grad():
        a = tiny_host.model(input_ids=both.ids).logits[1, : len(rows[1].ids)]
        b = tiny_host.model(input_ids=alone.ids).logits[0]
    assert torch.allclose(a, b, atol=1e-5)


def test_prompt_and_completion_are_tokenised_apart(tiny_host):
    tokenizer = tiny_host.tokenizer
    row = encode(tokenizer, [("51-86=", "-35\n")])[0]
    assert tokenizer.decode(row.ids[1 : row.prompt]) == "51-86=" and row.ids[0] == tokenizer.bos_token_id and row.ids[-1] == tokenizer.eos_token_id


def test_packed_rows_keep_every_token_in_order():
    joined = packed(ROWS, 99, 16)
    assert all(len(row.ids) <= 16 for row in joined)
    assert [t for row in joined for t in row.ids] == [t for row in ROWS for t in row.ids]


def test_a_stream_makes_each_chunk_from_its_number():
    made = []

    def make(chunk):
        made.append(chunk)
        return [Encoded((0, chunk + 2, 1), 1)] * 4

    stream = Stream(make, per_chunk=2, size=2, pad=1, seed=0)
    assert [int(stream(step).ids[0, 1]) for step in (0, 1, 2, 5)] == [2, 2, 3, 4] and made == [0, 1, 2]
