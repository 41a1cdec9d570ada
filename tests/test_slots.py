"""Slots: the same prompt as the renderer's, found among the tokens, and only strings that are read back as they were searched."""

import pytest

from evals.slots import NO_TEXT, slotted, spelled, vocabulary
from evals.tasks import TASKS

CODING = TASKS["coding"]


@pytest.mark.parametrize(("slot", "text"), [("season", "vexq"), ("place", "river"), ("lead", "Take it."), ("after_docstring", " ")])
def test_a_prompt_holding_a_string_is_the_renderers_and_its_span_is_found(tiny_tokenizer, slot, text):
    for index in range(5):
        prompt, wanted = slotted(CODING, "tune", index, 3, slot), CODING.row("tune", index, 3, **{slot: text})
        held, span = prompt.holding(text), prompt.span(tiny_tokenizer, text)
        assert (held.prompt, held.completion, held.calls, held.expected) == (wanted.prompt, wanted.completion, wanted.calls, wanted.expected)
        assert text.strip() in tiny_tokenizer.decode(span.inside)
        assert span.ids == tuple(tiny_tokenizer(held.prompt, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("slot", ["noun", "function", "nosuch"])
def test_a_slot_that_does_not_stand_once_is_refused(slot):
    with pytest.raises(ValueError, match=f"slot '{slot}' does not stand once"):
        slotted(CODING, "tune", 0, 3, slot)


def test_the_vocabulary_is_every_token_that_is_text_once_without_the_blank_that_stands_there(tiny_tokenizer):
    after_blank, after_none = (vocabulary(tiny_tokenizer, slotted(CODING, "tune", 0, 3, slot)) for slot in ("season", "after_docstring"))
    special, decoded = set(tiny_tokenizer.all_special_ids), [tiny_tokenizer.decode([token]) for token in range(len(tiny_tokenizer))]
    texts = {text for token, text in enumerate(decoded) if token not in special and NO_TEXT not in text}
    assert set(after_none) == texts and set(after_blank) == {text.removeprefix(" ") for text in texts} - {""}
    assert len(set(after_blank)) == len(after_blank) and " forest" in after_none and " forest" not in after_blank and "forest" in after_blank


def test_tokens_that_are_read_back_otherwise_spell_nothing(tiny_tokenizer):
    prompts = [slotted(CODING, "tune", index, 3, "season") for index in range(3)]
    frame = prompts[0].span(tiny_tokenizer, "winter")
    forest, lamp, bare = (tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" forest", " lamp", "lamp"))
    assert spelled(tiny_tokenizer, prompts, frame, (*forest, *lamp)) == "forest lamp"
    assert spelled(tiny_tokenizer, prompts, frame, bare) is None  # no blank before it: the prompt is another one
    letters = [tiny_tokenizer.convert_tokens_to_ids(letter) for letter in ("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "l", "a", "m", "p")]
    assert spelled(tiny_tokenizer, prompts, frame, letters) is None  # the same text, which is read as one token
    assert spelled(tiny_tokenizer, prompts, frame, [tiny_tokenizer.eos_token_id]) is None
