"""A completion's tokens are those that a model would write after the prompt, whatever the tokenizer puts before a text of its own."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graphs.batches import encode
from graphs.boundary import adds_a_blank, continued, written

TEXT = "Once upon a time there was a cat.\nHe said hi to the bird, and the bird said hi. Xavier ran to her at last. x . a b c"


def made(kind: str) -> PreTrainedTokenizerFast:
    """A BPE whose texts begin with a blank that the tokenizer adds (SentencePiece's normalizer, Metaspace, bytes), or with none (plain)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "normalizer":  # as Llama's tokenizer files say it
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only so that no token learns to span words
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "metaspace":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bytes"), decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT] * 9, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PAIRS = [("Once upon", " a time"), ("the bird", "s"), ("a cat.", "\nHe said"), ("a cat.", "\n\nHe said "), ("He said", ", and the bird"), ("a", " ")]


@pytest.mark.parametrize("kind", ["normalizer", "metaspace", "bytes", "plain"])
def test_a_completion_is_read_and_written_as_it_goes_on(kind):
    tokenizer = made(kind)
    assert adds_a_blank(tokenizer) == (kind != "plain")
    for prompt, completion in PAIRS:
        (row,) = encode(tokenizer, [(prompt, completion)])
        tail = list(row.ids[row.prompt : -1])
        assert tokenizer.decode(row.ids[1:-1], clean_up_tokenization_spaces=False).removeprefix(" ") == prompt + completion
        assert written(tokenizer, [tail, []]) == [completion, ""]
    alone = tokenizer("s", add_special_tokens=False)["input_ids"]
    assert (continued(tokenizer, ["s"])[0] != alone) == (kind != "plain")  # " s" is not what goes on "the bird"


def test_a_shared_word_has_the_tokens_of_the_whole_text():
    tokenizer = made("normalizer")
    whole = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    (row,) = encode(tokenizer, [("Once upon", " a time")])
    assert list(row.ids[1:-1]) == whole and continued(tokenizer, []) == written(tokenizer, []) == []


def test_a_tokenizer_that_joins_everything_is_refused():
    tokenizer = made("normalizer")
    joined = [AddedToken(guard + " end", normalized=False) for guard in ("\n", ".", "x", " ")]
    tokenizer.add_tokens(joined)
    with pytest.raises(ValueError, match="no telling where a completion begins"):
        continued(tokenizer, [" end"])
