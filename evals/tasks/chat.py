"""Questions of a file, asked in a model's chat template: `gsm8k@MODEL:PATH`, `svamp@MODEL:PATH`, `jsonl@MODEL:PATH`.

A model that was tuned to talk answers a question where its template puts one. MODEL is the folder or hub id whose template it is (nothing but its
tokenizer is read): the task carries the template, so that the model, its checkpoint and every rival are asked in the same words, and what a
run stores says which. The question alone is the user's turn, without the "Question:" and "Answer:" that a plain model is shown; the
answer follows the template's generation prompt, without the blank that follows "Answer:".

BOS is no part of the text: tokenising a prompt puts it there (`graphs.batches`). Programs and plain text are no questions and are refused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from evals.tasks.files import FileTask
from evals.tasks.task import SPLITS, Row

ASKED = ("gsm8k", "svamp", "jsonl")
"""Kinds whose rows are questions."""


class Chat(FileTask):
    """Rows of one file as turns of a conversation. name: KIND@MODEL:FILE, of both their last parts."""

    def __init__(self, kind: str, model: str, where: str) -> None:
        """Raises ValueError (one sentence) for a kind that asks nothing, and for a model that has no template."""
        asked = f"--task {kind}@{model}:{where}"
        if kind not in ASKED:
            raise ValueError(f"{asked}: rows of {kind} are no questions to ask in a chat; choose from {', '.join(ASKED)}, or leave @{model} out")
        super().__init__(kind, where)
        if not self.phrasable:
            raise ValueError(f"{asked}: it holds programs with tests, which are no questions to ask in a chat; leave @{model} out")
        tokenizer = templated(model, asked)
        self.name = f"{kind}@{model.rstrip('/').rpartition('/')[2]}:{self.name.partition(':')[2]}"
        self.stops = ()  # the turn ends with EOS
        self.splits = {split: [replace(turn(row, tokenizer), task=self.name) for row in self.splits[split]] for split in SPLITS}


def turn(row: Row, tokenizer) -> Row:
    """The row with its question as the user's turn, up to where the answer begins."""
    question = row.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True))
    return replace(row, prompt=text.removeprefix(tokenizer.bos_token or ""), completion=row.completion.strip())


@cache
def asked(kind: str, model: str, where: str) -> Chat:
    """The task of one file and one template, read once. Raises ValueError (one sentence) where it cannot be."""
    return Chat(kind, model, where)


def templated(model: str, asked: str):
    """The model's tokenizer. Raises ValueError where it cannot be read, has no chat template, or one whose turns do not end with EOS."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the library has many; each means the same to the user
        raise ValueError(f"{asked}: no tokenizer can be read from {model} ({type(error).__name__}); name a chat model") from error
    if not tokenizer.chat_template:
        raise ValueError(f"{asked}: the tokenizer of {model} has no chat template; leave @{model} out")
    probe = "distill-probe"
    said = str(tokenizer.apply_chat_template([{"role": "user", "content": "."}, {"role": "assistant", "content": probe}], tokenize=False))
    end = said.partition(probe)[2].strip()
    if not tokenizer.eos_token or not end.startswith(tokenizer.eos_token):
        raise ValueError(f"{asked}: the chat template of {model} ends a turn with {end[:20]!r}, not with EOS {tokenizer.eos_token!r}, where rows and "
                         "answers end; set eos_token in its tokenizer_config.json")
    return tokenizer
