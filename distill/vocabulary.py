"""Vocabulary rows on request: a model that holds only the tokens of its task, and the tokenizer that goes with it.

    rows of the task -> tokens met, what merging them goes through, special tokens, bytes -> rows of both tables, tokenizer, ids in configs

In a small model the tables are most of the file, and a task meets few of their rows. Why the task's text is still cut into the
same pieces: BPE makes the merge of lowest rank that applies, again and again, and where every merge that it makes on a text
is left, the lowest of those left is the same one. Which merges make a token does not depend on the text around it, for
none of them crossed the token's ends; so what the merges of each token met go through is all that must be kept besides. The
bytes are kept too, so that any other text can still be read, in more and smaller pieces. New ids follow the order of the
old ones, and there are exactly as many rows as tokens.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.generate import complete
from evals.size import held
from evals.tasks import Row, Task
from graphs.architectures import embeddings
from graphs.artifact import write_json
from graphs.batches import Batch, Encoded, Text, encode
from graphs.host import Host

REMEDY = "give --vocabulary all"
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Settings of generation that hold ids in shapes of their own; no causal model seen so far sets one."""


@dataclass(frozen=True)
class Kept:
    """What is left of a vocabulary of `whole` rows. tokens: by new id (empty where nothing is cut); rows: the id that each had."""

    tokens: tuple[str, ...]
    rows: Int[Tensor, " kept"]
    whole: int

    def renumbered(self, ids: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Old ids as new ones; -1 where the token was dropped."""
        numbers = torch.full((self.whole,), -1)
        numbers[self.rows] = torch.arange(len(self.rows))
        return numbers[ids]


def everything(host: Host) -> Kept:
    """The vocabulary with nothing dropped."""
    whole = host.config.vocab_size
    return Kept((), torch.arange(whole), whole)


def needed(host: Host, rows: Iterable[Encoded]) -> Kept:
    """What the task of `rows` needs. Raises ValueError where the tokenizer or the generation config cannot be renumbered."""
    data, tokenizer = _parsed(host.tokenizer), host.tokenizer
    vocabulary, whole = data["model"]["vocab"], host.config.vocab_size
    numbers = {token: number for token, number in tokenizer.get_vocab().items() if number < whole}
    names = {number: token for token, number in numbers.items()}
    if (held_by := next((name for name in ID_LISTS if getattr(host.model.generation_config, name, None)), None)) is not None:
        raise ValueError(f"--vocabulary task: the generation config's {held_by} cannot be renumbered; remove it or {REMEDY}")
    named = {number for config in _configs(host.model) for value in _token_ids(config).values() for number in _listed(value)}
    tokens = {names[number] for number in named | {number for row in rows for number in row.ids} if number in names}
    special = _special(tokenizer, data) & tokenizer.get_vocab().keys()
    if homeless := sorted(special - numbers.keys()):
        raise ValueError(f"--vocabulary task: the tokenizer's {homeless[0]} has no row among the model's {whole:,}; {REMEDY}")
    tokens |= special | _alphabet(data)
    ranks = {pair: rank for rank, pair in enumerate(_merges(data))}
    added = {entry["content"] for entry in data["added_tokens"]}
    tokens |= {piece for token in tokens - added for piece in _path(token, ranks)}
    # the library numbers added tokens behind the others
    order = sorted(tokens & numbers.keys(), key=lambda token: (token not in vocabulary, numbers[token]))
    return Kept(tuple(order), torch.tensor([numbers[token] for token in order]), whole)


def cut(host: Host, kept: Kept) -> Host:
    """A copy of the model and its tokenizer with the kept rows alone. Raises ValueError where the tokenizer's class adds tokens of its own."""
    model = copy.deepcopy(host.model)
    parameters = {id(p): p for end in embeddings(model)[:2] for p in end.parameters()}  # a tied table once, a bias of the unembedding too
    with torch.no_grad():
        for parameter in parameters.values():
            parameter[: len(kept.rows)] = parameter[kept.rows]
    model.resize_token_embeddings(len(kept.rows), mean_resizing=False)
    numbers = {old: new for new, old in enumerate(kept.rows.tolist())}
    for config in _configs(model):
        for key, value in _token_ids(config).items():
            left = [numbers[number] for number in _listed(value) if number in numbers]
            setattr(config, key, left if isinstance(value, list) else left[0] if left else None)  # an id that named no row names none now
    return Host(model, _renumbered(host.tokenizer, kept), host.sites)


def measured(full: Host, small: Host, kept: Kept, seen: Sequence[Text], held_out: Sequence[tuple[Task, Sequence[Row]]], batch: Batch) -> dict:
    """What the cut cost: `seen` are the texts that it was made for, `held_out` rows that it never saw, `batch` rows of `seen` with old ids.

    Returns {"rows", "of", "parameters", "max_abs_logit_diff" (at the kept tokens), "held_out", "same_tokens" and "same_text" (shares of
    the rows held out; a row that is cut into other pieces counts as another text)}. Raises ValueError where a seen text is not
    cut into the same pieces or a logit moved.
    """
    same = alike(full, small, kept, seen)
    if not all(same):
        raise ValueError(f"--vocabulary task: the smaller tokenizer cuts {len(same) - sum(same)} of the task's rows into other pieces; {REMEDY}")
    with torch.no_grad():
        before, after = (host.model(input_ids=ids).logits for host, ids in ((full, batch.ids), (small, kept.renumbered(batch.ids))))
    difference = float((before[..., kept.rows] - after)[batch.real].abs().max())
    if not difference <= 1e-4:
        raise ValueError(f"--vocabulary task: logits of kept tokens moved by {difference:.2g} > 1e-4; this is a defect, please report it")
    tokens = texts = count = 0
    for task, rows in held_out:
        fits = alike(full, small, kept, [(row.prompt, row.completion) for row in rows])
        prompts = [row.prompt for row, fit in zip(rows, fits, strict=True) if fit]
        theirs, ours = (complete(host, prompts, task.max_new_tokens) for host in (full, small))
        tokens, count = tokens + sum(fits), count + len(rows)
        texts += sum(a == b for a, b in zip(theirs, ours, strict=True))
    sizes = [held(host.model) for host in (full, small)]
    dropped = sizes[0].stored + sizes[0].embeddings - sizes[1].stored - sizes[1].embeddings
    return {"rows": len(kept.rows), "of": kept.whole, "parameters": dropped, "max_abs_logit_diff": difference,
            "held_out": count, "same_tokens": tokens / count, "same_text": texts / count}


def alike(full: Host, small: Host, kept: Kept, texts: Sequence[Text]) -> list[bool]:
    """Whether both tokenizers cut each text into the same pieces."""
    before, after = (encode(host.tokenizer, texts, sys.maxsize) for host in (full, small))
    return [kept.renumbered(torch.tensor(a.ids)).tolist() == list(b.ids) for a, b in zip(before, after, strict=True)]


def _parsed(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer.json of a BPE over bytes. Raises ValueError for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = data["model"]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or marked or not _alphabet(data):
        raise ValueError(f"--vocabulary task: only a BPE tokenizer over bytes (byte-level or with byte fallback) can be cut, and this one is "
                         f"{model['type']}{'' if model['type'] != 'BPE' else ' of another kind'}; {REMEDY}")
    return data


def _alphabet(data: dict[str, Any]) -> set[str]:
    """The tokens that stand for single bytes, as far as the tokenizer has them; none where it has no way to fall back on them."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary, fallback = data["model"]["vocab"], {f"<0x{byte:02X}>" for byte in range(256)}
    if "ByteLevel" in _kinds([data["normalizer"], data["pre_tokenizer"]]):
        return set(ByteLevel.alphabet()) & vocabulary.keys()
    return fallback if data["model"]["byte_fallback"] and fallback <= vocabulary.keys() else set()


def _kinds(part: Any) -> set[str]:
    """The types of a tokenizer's part and of everything inside it."""
    if isinstance(part, dict):
        return {part.get("type", "")} | _kinds(list(part.values()))
    return {kind for inner in part for kind in _kinds(inner)} if isinstance(part, list) else set()


def _special(tokenizer: PreTrainedTokenizerBase, data: dict[str, Any]) -> set[str]:
    """Tokens that the tokenizer names: special ones, and what it puts around a text."""
    named = {entry["content"] for entry in data["added_tokens"] if entry["special"]} | set(tokenizer.all_special_tokens)
    template = {token for entry in _templates(data) for token in entry["tokens"]}
    return named | template | {token for token, _ in _ends(data)} | ({data["model"]["unk_token"]} - {None})


def _stages(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The post-processor as a list of plain ones."""
    whole = data["post_processor"] or {}
    return whole.get("processors", [whole])


def _templates(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries {"tokens", "ids"} of templates in the post-processor."""
    return [entry for stage in _stages(data) for entry in stage.get("special_tokens", {}).values()]


def _ends(data: dict[str, Any]) -> list[list[Any]]:
    """Pairs [token, id] of post-processors that have one for each end (BERT's and RoBERTa's)."""
    return [stage[end] for stage in _stages(data) for end in ("cls", "sep") if end in stage]


def _merges(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs that are merged, lowest rank first."""
    return [(first, second) for first, second in data["model"]["merges"]]


def _path(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """What merging goes through from the characters of a token to the token, both included."""
    pieces = list(token)
    seen = set(pieces)
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, math.inf), at) for at, pair in enumerate(pairwise(pieces)))
        if rank == math.inf:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        seen.add(pieces[at])
    return seen


def _renumbered(tokenizer: PreTrainedTokenizerBase, kept: Kept) -> PreTrainedTokenizerBase:
    """The tokenizer with the kept tokens alone, as its own class loads it. Raises ValueError where that adds or moves tokens."""
    from transformers import AutoTokenizer

    numbers, data = {token: number for number, token in enumerate(kept.tokens)}, _parsed(tokenizer)
    model = data["model"]
    model["vocab"] = {token: number for token, number in numbers.items() if token in model["vocab"]}
    model["merges"] = [pair for pair in _merges(data) if {*pair, "".join(pair)} <= numbers.keys()]
    data["added_tokens"] = [entry | {"id": numbers[entry["content"]]} for entry in data["added_tokens"] if entry["content"] in numbers]
    for entry in _templates(data):
        entry["ids"] = [numbers[token] for token in entry["tokens"]]
    for end in _ends(data):
        end[1] = numbers[end[0]]
    if data["padding"]:
        data["padding"]["pad_id"] = numbers[data["padding"]["pad_token"]]
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        write_json(Path(folder) / "tokenizer.json", data)
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if made.get_vocab() != numbers:
        raise ValueError(f"--vocabulary task: {type(tokenizer).__name__} adds tokens of its own to the kept ones; {REMEDY}")
    return made


def _configs(model: PreTrainedModel) -> list[Any]:
    """Where a model keeps the ids of its special tokens."""
    return [config for config in (model.config, model.generation_config) if config is not None]


def _token_ids(config: Any) -> dict[str, int | list[int]]:
    """The settings that hold the ids of tokens (bos_token_id, eos_token_id, ...)."""
    return {key: value for key, value in config.to_dict().items() if key.endswith("_token_id") and value is not None}


def _listed(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
