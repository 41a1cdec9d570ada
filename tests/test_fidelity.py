"""Fidelity is perfect to oneself, is KL in the stated direction, and needs one vocabulary."""

import pytest
import torch

from distill.base import new_model
from evals.fidelity import compare
from evals.tasks import TASKS
from graphs.architectures import sites
from graphs.host import Host, load

ROWS = TASKS["coding"].rows("test", 5, 2) + TASKS["math"].rows("test", 3, 2)


def test_a_model_follows_itself(tiny_host):
    same = compare(tiny_host, tiny_host, ROWS, batch=3)
    assert same.kl == pytest.approx([0.0] * 8, abs=1e-9) and same.agreement == [1.0] * 8


def test_kl_is_the_reference_coded_by_the_host(tiny_host, tiny_model_folder):
    other = load(tiny_model_folder)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(3.0)  # sharper, and a different model
    measured = compare(other, tiny_host, ROWS, batch=3)
    row, tokenizer = ROWS[1], tiny_host.tokenizer
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row.prompt, row.completion))
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *answer]])
    with torch.no_grad():
        p, q = (host.model(input_ids=ids).logits[0, len(prompt) :].log_softmax(-1) for host in (tiny_host, other))
    assert measured.kl[1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert measured.agreement[1] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert measured.kl[1] != pytest.approx(compare(tiny_host, other, ROWS, batch=3).kl[1], rel=1e-2)  # the other direction is another number


def test_models_with_different_vocabularies_are_refused(tiny_host, tiny_tokenizer):
    model = new_model(len(tiny_tokenizer) + 8, tiny_tokenizer, 0, hidden_size=48, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1)
    with pytest.raises(ValueError, match="vocabulary"):
        compare(Host(model, tiny_tokenizer, sites(model)), tiny_host, ROWS)
