"""The base model: a stock Llama of about a million parameters, trained from scratch on the three tasks.

Width 144 keeps many head counts legal (1, 2, 3, 4, 6, 8, 9, 12), nine heads of 16. The tokenizer is a byte-level BPE in
which every digit is a token of its own. Rows come from the `trace` split only, an endless stream; each row is its own
sequence, and every eighth batch is packed to the full context of 512 so that late positions are trained too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evals.tasks import TASKS
from evals.tasks.task import source
from graphs.architectures import sites
from graphs.artifact import whole, write_json
from graphs.batches import Encoded, Stream, collate, encode, packed
from graphs.host import Host, save
from graphs.train import TrainConfig, discard, train

TRAINING_SEED = 1
"""Rows of the base are drawn with this seed; the defender's rows and every evaluation use others."""


@dataclass(frozen=True)
class BaseConfig:
    """steps: batches of `rows` rows (about 60 tokens each); mixture: shares of tasks; width: of the residual stream, in heads of 16 and thrice
    as many neurons."""

    steps: int = 5000
    rows: int = 64
    learning_rate: float = 4e-3
    vocabulary: int = 1024
    width: int = 144
    mixture: Mapping[str, float] = field(default_factory=lambda: {"coding": 0.46, "math": 0.40, "stories": 0.14})
    seed: int = 0


SMALL = BaseConfig(steps=3500, rows=48, width=96, mixture={"coding": 0.8, "stories": 0.2})
"""The base of the bench: half a million parameters and no sums, so that a cell costs a minute."""


def build_tokenizer(vocabulary: int):
    """A byte-level BPE trained on rows of the `trace` split; digits are split; BOS is added by the tokenizer itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # without this "=-" is one token, and a worksheet's question looks unlike its solved lines
    equals = pre_tokenizers.Split(Regex("(?<=[0-9)])="), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [equals, pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    rows = [row for task in TASKS.values() for row in task.rows("trace", 6000, seed=TRAINING_SEED)]
    tokenizer.train_from_iterator((text for row in rows for text in (row.prompt, row.completion)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False)


def mixed_rows(mixture: Mapping[str, float], seed: int, chunk: int, count: int) -> list:
    """Rows `chunk * count ...` of the training mixture."""
    rows = []
    for index in range(chunk * count, (chunk + 1) * count):
        task = TASKS[source("mixture", seed, index).choices(tuple(mixture), tuple(mixture.values()))[0]]
        rows.append(task.row("trace", index, seed))
    return rows


def new_model(vocabulary: int, tokenizer, seed: int, **changes: int):
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 144, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 9}
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, **(shape | changes)))


def train_base(folder: Path, config: BaseConfig, state: Path | None = None) -> None:
    """Train the base and write it to `folder`; resumes from `state`."""
    tokenizer = build_tokenizer(config.vocabulary)
    heads = config.width // 16
    model = new_model(config.vocabulary, tokenizer, config.seed, hidden_size=config.width, intermediate_size=3 * config.width,
                      num_attention_heads=heads, num_key_value_heads=heads)
    pad, per_chunk = tokenizer.eos_token_id, 64

    def chunk(index: int) -> list[Encoded]:
        return encode(tokenizer, [(row.prompt, row.completion) for row in mixed_rows(config.mixture, TRAINING_SEED, index, per_chunk * config.rows)])

    stream = Stream(chunk, per_chunk, config.rows, pad, config.seed)

    def loss(step: int) -> torch.Tensor:
        batch = stream(step)
        if step % 8 == 7:
            rows = [Encoded(tuple(ids[keep].tolist()), 1) for ids, keep in zip(batch.ids, batch.real, strict=True)]
            batch = collate(packed(rows, config.rows, 512), pad)
        return model(input_ids=batch.ids, labels=batch.labels).loss

    model.train()
    losses = train(model, loss, TrainConfig(config.steps, config.learning_rate, warmup=0.02, decay=0.9, weight_decay=0.05), "base", state)
    model.eval()
    with whole(folder) as out:
        save(Host(model, tokenizer, sites(model)), out)
        final = sum(losses[-50:]) / len(losses[-50:])
        write_json(out / "receipt.json", {"recipe": "distill.base", "config": config, "final_loss": final})
    if state:
        discard(state)
