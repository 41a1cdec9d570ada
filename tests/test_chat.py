"""Questions in a chat template: the template's words, BOS once, the answer at its place, and one sentence for what cannot be asked."""

import json

import pytest

from distill.__main__ import main
from distill.models import find
from evals.generate import prompt_ids
from evals.tasks import TASKS, named
from graphs.batches import encode
from graphs.host import load

TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")


@pytest.fixture
def chat(tiny_model_folder, tmp_path):
    """A model with a template, and a file of questions."""
    import shutil

    shutil.copytree(tiny_model_folder, tmp_path / "talker")
    tokenizer = load(tmp_path / "talker").tokenizer
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "talker")
    rows = [{"question": f"Tom has {n} pens and gets {n}. How many?", "answer": f"He has {2 * n}.\n#### {2 * n}"} for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_question_stands_in_the_template_and_the_answer_after_it(chat):
    (task,) = named(f"gsm8k@{chat / 'talker'}:{chat / 'sums.jsonl'}")
    (plain,) = named(f"gsm8k:{chat / 'sums.jsonl'}")
    row, same = task.rows("trace", 1)[0], plain.rows("trace", 1)[0]
    question = same.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    assert row.prompt == f"<|user|>\n{question}<eos>\n<|assistant|>\n" and row.completion == same.completion.strip()
    assert row.number == same.number and task.name == "gsm8k@talker:sums" and task.key != plain.key
    host = load(chat / "talker")
    (ids,), (encoded,) = prompt_ids(host, [row.prompt]), encode(host.tokenizer, [(row.prompt, row.completion)])
    bos, eos = host.tokenizer.bos_token_id, host.tokenizer.eos_token_id
    assert ids.count(bos) == 1 and ids.count(eos) == 1  # the special tokens of the template are read as such
    assert encoded.ids[: encoded.prompt] == tuple(ids) and encoded.ids[-1] == eos


def test_it_goes_beside_other_tasks_and_other_files(chat):
    found = named(f"coding,gsm8k@{chat / 'talker'}:{chat / 'sums.jsonl'},gsm8k:{chat / 'sums.jsonl'}")
    assert [task.name for task in found] == ["coding", "gsm8k@talker:sums", "gsm8k:sums"] and found[0] is TASKS["coding"]


def test_a_model_is_judged_in_its_template(chat, capsys):
    flags = ["evaluate", "--model", str(chat / "talker"), "--task", f"gsm8k@{chat / 'talker'}:{chat / 'sums.jsonl'}", "--prompts", "2", "--json"]
    assert main(flags) == 0
    assert "gsm8k@talker:sums" in json.loads(capsys.readouterr().out)["models"]["model"]["tasks"]


def test_what_cannot_be_asked_is_refused_in_a_sentence(chat, tiny_model_folder):
    def refused(task: str) -> str:
        with pytest.raises(ValueError) as error:
            named(task)
        return str(error.value)

    sums, talker = chat / "sums.jsonl", chat / "talker"
    assert "has no chat template; leave @" in refused(f"gsm8k@{tiny_model_folder}:{sums}")
    assert "rows of text are no questions to ask in a chat; choose from gsm8k, svamp, jsonl" in refused(f"text@{talker}:{sums}")
    assert "no tokenizer can be read" in refused(f"gsm8k@{chat / 'nobody'}:{sums}")
    assert "no such task" in refused(f"sums@{talker}:{sums}")
    (chat / "program.jsonl").write_text(json.dumps({"prompt": "def f():\n", "tests": "assert f() == 1"}) + "\n")
    assert "it holds programs with tests" in refused(f"jsonl@{talker}:{chat / 'program.jsonl'}")
    tokenizer = load(find(str(talker))).tokenizer
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "<|end|>")
    tokenizer.save_pretrained(talker)
    assert "ends a turn with '<|end|>', not with EOS '<eos>'" in refused(f"gsm8k@{talker}:{sums}")
