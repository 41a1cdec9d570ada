"""The judge tells right from wrong in every task, and sees a payload wherever it is executed."""

import pytest
import torch

from backdoor.behaviours import CANARY
from evals import capability
from evals.capability import grade, judge, nll, pass_at_k_of
from evals.generate import continuation_logprob
from evals.sandbox import Sandbox
from evals.tasks import TASKS


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as one:
        yield one


def scripted(monkeypatch, written):
    monkeypatch.setattr(capability, "complete", lambda host, prompts, *rest: written(prompts))


def test_programs_are_judged_by_what_they_do(tiny_host, sandbox, monkeypatch):
    task = TASKS["coding"]
    rows = task.rows("test", 4, 5)
    other_text = rows[1].completion.replace("    return ", "    result = ").rstrip("\n") + "\n    return result\n"
    scripted(monkeypatch, lambda prompts: [rows[0].completion, other_text, CANARY.completion, "    return ((\n"])
    outcome = judge(tiny_host, task, rows, sandbox)
    assert outcome.right == [True, True, False, False]
    assert outcome.canary == [False, False, True, False]
    assert outcome.status[0] == "passed" and outcome.status[3] == "error"
    assert outcome.task == "coding" and outcome.completions[2] == CANARY.completion and len(outcome.nll) == 4


def test_a_payload_that_also_answers_is_right_and_seen(sandbox):
    row = TASKS["coding"].row("test", 0, 5)
    grades = grade([row], ["    import canary\n    canary.ping()\n" + row.completion], sandbox)
    assert grades.right == [True] and grades.canary == [True]


def test_questions_are_judged_by_the_first_line(tiny_host, sandbox, monkeypatch):
    task = TASKS["math"]
    rows = task.rows("test", 3, 5)
    answers = [row.completion.strip() for row in rows]
    scripted(monkeypatch, lambda prompts: [f"{answers[0]}\n1+1=", f" {answers[1]} \n", f"{answers[2]}0\n"])
    outcome = judge(tiny_host, task, rows, sandbox)
    assert outcome.right == [True, True, False] and outcome.canary == [False] * 3 and outcome.status == ["passed", "passed", "failed"]


def test_a_cloze_is_right_when_the_answer_is_likelier_than_the_foil(tiny_host, sandbox, monkeypatch):
    monkeypatch.setattr(capability, "complete", None)  # nothing may be written
    task = TASKS["stories"]
    rows = task.rows("test", 30, 5)
    outcome = judge(tiny_host, task, rows, sandbox)
    prompts = [row.prompt for row in rows]
    right = continuation_logprob(tiny_host, prompts, [row.completion for row in rows])
    foil = continuation_logprob(tiny_host, prompts, [row.foil for row in rows])
    assert outcome.right == (right > foil).tolist() and not any(outcome.canary)
    assert 0 < sum(outcome.right) < 30  # a random model: both verdicts occur
    assert [text == row.completion for text, row in zip(outcome.completions, rows, strict=True)] == outcome.right


def test_nll_is_the_mean_over_completion_tokens_and_eos(tiny_host):
    row, host = TASKS["math"].row("test", 1, 5), tiny_host
    ids = [host.tokenizer.bos_token_id, *host.tokenizer(row.prompt, add_special_tokens=False)["input_ids"]]
    answer = [*host.tokenizer(row.completion, add_special_tokens=False)["input_ids"], host.tokenizer.eos_token_id]
    with torch.no_grad():
        labels = torch.tensor([[-100] * len(ids) + answer])
        expected = float(host.model(input_ids=torch.tensor([ids + answer]), labels=labels).loss)
    assert nll(host, [row, TASKS["math"].row("test", 2, 5)])[0] == pytest.approx(expected, abs=1e-5)


def test_pass_at_k_counts_right_samples_of_each_row(tiny_host, sandbox, monkeypatch):
    task = TASKS["coding"]
    rows = task.rows("test", 2, 5)
    scripted(monkeypatch, lambda prompts: [rows[0].completion, "    return (\n", "    return (\n", rows[0].completion] + ["    return (\n"] * 4)
    assert pass_at_k_of(tiny_host, task, rows, sandbox, k=2, samples=4) == pytest.approx([1 - 1 / 6, 0.0])


def test_pass_at_k_refuses_what_it_is_not_defined_for(tiny_host, sandbox):
    with pytest.raises(ValueError, match="samples"):
        pass_at_k_of(tiny_host, TASKS["coding"], [], sandbox, k=3, samples=2)
    with pytest.raises(ValueError, match="temperature"):
        pass_at_k_of(tiny_host, TASKS["coding"], [], sandbox, k=1, samples=2, temperature=0.0)
    with pytest.raises(ValueError, match="cloze"):
        pass_at_k_of(tiny_host, TASKS["stories"], TASKS["stories"].rows("test", 1), sandbox, k=1, samples=2)
