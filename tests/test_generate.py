"""Batching changes nothing that is written or measured, and randomness stays inside."""

import pytest
import torch
from transformers import DynamicCache

from evals.generate import complete, continuation_logprob, decode, greedy, prompt_ids, sampler
from evals.tasks import TASKS
from graphs.batches import left_padded

PROMPTS = ["def solve(a):\n", "12+30=42\n7<12:", "Anna", "One day Tom went to the park with a small red kite.", ""]


@pytest.fixture
def sharp(tiny_host):
    """The tiny model with an output head of its own, large enough for rows to end at different steps."""
    head = torch.nn.Linear(tiny_host.config.hidden_size, tiny_host.config.vocab_size, bias=False)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    tiny_host.model.lm_head = head
    return tiny_host


def alone(host, prompt, new_tokens, stop):
    """Greedy decoding of one prompt with neither padding nor cache."""
    ids, new = prompt_ids(host, [prompt])[0], []
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(host.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token == stop:
            break
        new.append(token)
    return new


def test_a_padded_batch_that_drops_ended_rows_writes_what_each_row_writes_alone(sharp):
    free = [alone(sharp, prompt, 12, None) for prompt in PROMPTS]
    stop = free[0][4]  # a token that ends row 0 in the middle, and with it whatever other rows it ends
    expected = [alone(sharp, prompt, 12, stop) for prompt in PROMPTS]
    assert decode(sharp, prompt_ids(sharp, PROMPTS), 12, greedy, None) == free
    assert decode(sharp, prompt_ids(sharp, PROMPTS), 12, greedy, stop) == expected
    assert len({len(row) for row in expected}) > 1


def test_ended_rows_leave_the_cache(sharp, monkeypatch):
    kept = []
    original = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, rows: (kept.append(rows.tolist()), original(self, rows))[1])
    stop = alone(sharp, PROMPTS[0], 5, None)[4]
    decode(sharp, prompt_ids(sharp, PROMPTS), 12, greedy, stop)
    assert kept and 0 not in kept[-1]


def test_completions_keep_the_order_of_the_prompts_and_stop_at_eos(sharp):
    free = [alone(sharp, prompt, 12, None) for prompt in PROMPTS]
    stop = free[0][4]
    sharp.tokenizer.eos_token = sharp.tokenizer.convert_ids_to_tokens(stop)  # this tokenizer was loaded for this test alone
    assert sharp.tokenizer.eos_token_id == stop
    expected = [sharp.tokenizer.decode(alone(sharp, prompt, 12, stop), skip_special_tokens=True) for prompt in PROMPTS]
    assert complete(sharp, PROMPTS, 12, batch=2) == complete(sharp, PROMPTS, 12) == expected
    assert complete(sharp, [], 12) == []


def test_samples_depend_on_the_seed_and_leave_the_global_state_alone(tiny_host):
    before = torch.random.get_rng_state()
    first, again, other = (complete(tiny_host, PROMPTS, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_samples_follow_the_tempered_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0]).repeat(20000, 1)
    share = torch.bincount(sampler(0.5, 0, torch.device("cpu"))(logits), minlength=3) / 20000
    assert torch.allclose(share, (logits[0] / 0.5).softmax(-1), atol=0.02)  # 0.02 is over five standard errors


def test_left_padding_hides_pads_and_leaves_room():
    ids, mask = left_padded([[5, 6], [7]], pad=1, room=2, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [1, 7]] and mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_prompt_without_room_and_a_negative_temperature_are_refused(tiny_host):
    with pytest.raises(ValueError, match="context of 512"):
        complete(tiny_host, ["a"], 600)
    with pytest.raises(ValueError, match="temperature"):
        complete(tiny_host, ["a"], 2, temperature=-1.0)


def test_the_log_probability_of_a_continuation_is_the_sum_over_its_own_tokens(tiny_host):
    rows = TASKS["stories"].rows("test", 5, 3) + TASKS["coding"].rows("test", 4, 3)
    by_hand = []
    for row in rows:
        prompt = prompt_ids(tiny_host, [row.prompt])[0]
        answer = tiny_host.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            said = tiny_host.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        by_hand.append(sum(float(said[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)))
    batched = continuation_logprob(tiny_host, [row.prompt for row in rows], [row.completion for row in rows], batch=4)
    assert torch.allclose(batched, torch.tensor(by_hand, dtype=torch.float64), atol=1e-3)
    assert continuation_logprob(tiny_host, [], []).shape == (0,)
