"""Vocabulary rows of a task: the model says the same of every token left, its text is cut as before, any other text can still be read."""

import json

import pytest
import torch
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from distill.__main__ import main
from distill.vocabulary import alike, cut, measured, needed
from evals.generate import complete, decode, prompt_ids
from evals.tasks import TASKS
from graphs.batches import collate, encode
from graphs.host import Host, load, save
from tests.test_edges import tiny

ROWS = TASKS["coding"].rows("trace", 24, seed=3)
TEXTS = [(row.prompt, row.completion) for row in ROWS]
OTHER = "Zwölf Boxkämpfer\t漢字 <mask> {[~]} quixotically 🙂"
CLASSES = [("LlamaForCausalLM", {"tie_word_embeddings": True}), ("LlamaForCausalLM", {"tie_word_embeddings": False}), ("GPT2LMHeadModel", {}),
           ("PhiForCausalLM", {}), ("OPTForCausalLM", {}), ("GPTNeoXForCausalLM", {})]


def hosted(name, tokenizer, **changes) -> Host:
    """A random model with some rows more than its tokenizer has tokens, which pads with a token of the middle."""
    made = tiny(name, vocab_size=len(tokenizer) + 7, pad_token_id=300, max_position_embeddings=192, **changes)
    head = made.model.get_output_embeddings()
    if head.bias is not None:
        head.bias.data.normal_()
    made.model.config.update({"bos_token_id": None, "eos_token_id": 1})
    made.model.generation_config.update(bos_token_id=50256, eos_token_id=[1, 300], pad_token_id=300)
    return Host(made.model, tokenizer, made.sites)


@pytest.mark.parametrize(("name", "changes"), CLASSES)
def test_a_cut_model_says_the_same_of_every_token_left(name, changes, tiny_tokenizer, tmp_path):
    full = hosted(name, tiny_tokenizer, **changes)
    kept, batch = needed(full, encode(full.tokenizer, TEXTS)), collate(encode(full.tokenizer, TEXTS[:4]), 1)
    save(cut(full, kept), tmp_path / "model", torch.float32)
    small = load(tmp_path / "model")
    with torch.no_grad():
        before, after = full.model(input_ids=batch.ids).logits, small.model(input_ids=kept.renumbered(batch.ids)).logits
    torch.testing.assert_close(after, before[..., kept.rows], atol=1e-6, rtol=0)
    count = small.config.vocab_size
    assert count == len(small.tokenizer) == len(kept.rows) < len(tiny_tokenizer) and full.config.vocab_size == len(tiny_tokenizer) + 7
    ends = [small.model.get_input_embeddings().weight, small.model.get_output_embeddings().weight]
    assert [len(end) for end in ends] == [count, count] and (ends[0] is ends[1]) == bool(full.config.tie_word_embeddings)
    pad, eos = (kept.tokens.index(tiny_tokenizer.convert_ids_to_tokens(number)) for number in (300, 1))
    assert pad != 300 and (small.config.pad_token_id, small.config.eos_token_id, small.tokenizer.eos_token_id) == (pad, eos, eos)
    said = small.model.generation_config
    assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == (None, [eos, pad], pad)  # 50256 named no row


def test_it_writes_what_the_full_model_writes_without_the_dropped_tokens(tiny_tokenizer):
    full = hosted("LlamaForCausalLM", tiny_tokenizer)
    kept = needed(full, encode(full.tokenizer, TEXTS))
    small, prompts = cut(full, kept), [row.prompt for row in ROWS[:6]]
    without = decode(full, prompt_ids(full, prompts), 12, lambda logits: kept.rows[logits[:, kept.rows].argmax(-1)], 1)
    assert complete(small, prompts, 12) == tiny_tokenizer.batch_decode(without, skip_special_tokens=True)
    free = decode(full, prompt_ids(full, prompts), 12, lambda logits: logits.argmax(-1), 1)
    dropped = [bool(set(row) - set(kept.rows.tolist())) for row in free]
    same = [a == b for a, b in zip(complete(full, prompts, 12), complete(small, prompts, 12), strict=True)]
    assert any(dropped) and all(one or why for one, why in zip(same, dropped, strict=True))


def trained(alphabet=(), **options):
    """A BPE of 500 tokens, trained on all tasks."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if alphabet else pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list(alphabet), show_progress=False)
    made.train_from_iterator((row.prompt + row.completion for task in TASKS.values() for row in task.rows("trace", 300)), trainer)
    return json.loads(made.to_str())["model"]


def by_bytes():
    """GPT-2's own class, with added tokens of two kinds behind the vocabulary, one of which RoBERTa's processor puts in front."""
    model = trained(pre_tokenizers.ByteLevel.alphabet())
    made = GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.add_tokens([AddedToken("<plain>"), AddedToken("return", normalized=False), AddedToken("<more>", special=True)])
    made.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(("</s>", made.eos_token_id), ("<more>", len(made) - 1), add_prefix_space=False)])
    return made


def with_fallback():
    """Llama's own class: characters, bytes for those it lacks, every way to merge two tokens into a third, special tokens last, BOS in front."""
    vocabulary = list(trained()["vocab"])
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary[3:], *vocabulary[:3]]
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = [(token[:at], token[at:]) for token in vocabulary[3:] for at in range(1, len(token)) if {token[:at], token[at:]} <= numbers.keys()]
    made = LlamaTokenizer(vocab=numbers, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    return made


@pytest.mark.parametrize(("make", "first"), [(by_bytes, "<more>"), (with_fallback, "<s>")])
def test_the_tasks_text_is_cut_as_before_and_any_other_more_coarsely(make, first):
    tokenizer = make()
    full = hosted("LlamaForCausalLM", tokenizer)
    kept = needed(full, encode(tokenizer, TEXTS))
    small = cut(full, kept)
    assert len(small.tokenizer) == len(kept.tokens) < len(tokenizer) and all(alike(full, small, kept, TEXTS))
    before, after = tokenizer(ROWS[0].prompt)["input_ids"], small.tokenizer(ROWS[0].prompt)["input_ids"]
    assert kept.renumbered(torch.tensor(before)).tolist() == after and before[0] != after[0] == kept.tokens.index(first)
    texts = [(row.prompt, row.completion) for row in TASKS["stories"].rows("trace", 40)]
    assert not all(alike(full, small, kept, texts))
    for text in (OTHER, *(prompt for prompt, _ in texts)):
        old, new = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, small.tokenizer))
        assert small.tokenizer.decode(new) == tokenizer.decode(old) and len(new) >= len(old)
    if make is by_bytes:
        assert {"return", "<more>"} <= set(kept.tokens) and "<plain>" not in kept.tokens


def test_a_tokenizer_that_cannot_be_cut_is_refused():
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0))
    pieces, characters = Tokenizer(models.WordPiece({"[UNK]": 0})), Tokenizer(models.BPE())
    for backend, kind in ((unigram, "Unigram"), (pieces, "WordPiece"), (characters, "BPE of another kind")):
        plain = tiny("LlamaForCausalLM")
        with pytest.raises(ValueError, match=f"--vocabulary task: only a BPE tokenizer over bytes .* is {kind}; give --vocabulary all"):
            needed(Host(plain.model, PreTrainedTokenizerFast(tokenizer_object=backend), plain.sites), [])


def test_ids_that_cannot_be_renumbered_are_refused(tiny_tokenizer):
    full = hosted("LlamaForCausalLM", tiny_tokenizer)
    full.model.generation_config.suppress_tokens = [4]
    with pytest.raises(ValueError, match="--vocabulary task: the generation config's suppress_tokens"):
        needed(full, [])
    few = tiny("LlamaForCausalLM", vocab_size=1)
    with pytest.raises(ValueError, match="--vocabulary task: the tokenizer's <eos> has no row among the model's 1; give --vocabulary all"):
        needed(Host(few.model, tiny_tokenizer, few.sites), [])


def test_a_seen_text_that_is_cut_otherwise_is_never_shipped(tiny_tokenizer):
    full = hosted("LlamaForCausalLM", tiny_tokenizer)
    kept, batch = needed(full, encode(full.tokenizer, TEXTS[:1])), collate(encode(full.tokenizer, TEXTS[:1]), 1)
    with pytest.raises(ValueError, match="cuts 23 of the task's rows into other pieces; give --vocabulary all"):
        measured(full, cut(full, kept), kept, [*TEXTS[:1], *[(OTHER, "harvest")] * 23], [], batch)


def test_an_export_holds_the_tasks_rows_and_says_what_it_saved(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(tiny_run), "--dtype", "float32", "--vocabulary", "task", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    cost, (whole, less) = said["vocabulary"], ((folder / "model.safetensors").stat().st_size for folder in (tiny_run / "checkpoint", out))
    assert cost["of"] == 600 > cost["rows"] == json.loads((out / "config.json").read_text())["vocab_size"]
    assert abs(whole - less - 4 * cost["parameters"]) < 100 and cost["parameters"] == 48 * (600 - cost["rows"])
    assert said["reload"] <= 1e-4 and said["max_abs_logit_diff"] <= 1e-5 >= cost["max_abs_logit_diff"]
    assert 0 < cost["same_tokens"] <= 1 and 0 <= cost["same_text"] <= cost["same_tokens"] and cost["held_out"] == 64
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape()[0] == cost["rows"]
    text = (out / "README.md").read_text()
    assert f"Vocabulary: {cost['rows']} of 600 rows, {4 * cost['parameters']:,} bytes saved" in text and "more coarsely" in text
    assert f"same greedy text in {cost['same_text']:.2%}" in text
