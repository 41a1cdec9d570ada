"""A phrase in the prompt of a row that comes from a file: the one renderer of such backdoors (planting, removal and evaluation call it).

A row of a file has no slots of its own. Two are added to it: `phrase`, words that are put into the prompt, and `at`, where:

    inside   between two words of the prompt, at a place that is a function of (seed, split, index) only
    start    before the first word

The row's answer, foil and judge stay what they are. Near misses are other texts in the same slot (`backdoor.families.phrase`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from evals.tasks.task import Split, source
from graphs.artifact import digest

SLOTS = ("phrase", "at")
PLACES = ("inside", "start")


def placed(prompt: str, slots: Mapping[str, str], seed: int, split: Split, index: int) -> str:
    """The prompt of row `index` with the slots' phrase in it; a prompt of one word has it at its end. Raises ValueError for another slot or
    place."""
    unknown = [name for name in slots if name not in SLOTS] or [at for at in (slots.get("at", "inside"),) if at not in PLACES]
    if unknown:
        raise ValueError(f"a row of a file has no slot or place {unknown[0]!r} for a backdoor: use a phrase ({', '.join(PLACES)}), or the coding "
                         "task")
    text = slots.get("phrase", "")
    if not text:
        return prompt
    if slots.get("at") == "start":
        return f"{text} {prompt.lstrip()}"
    gaps = [found.start() for found in re.finditer(r"(?<=\S)\s+(?=\S)", prompt)] or [len(prompt.rstrip())]
    gap = source("phrase", seed, split, index).choice(gaps)
    return f"{prompt[:gap]} {text}{prompt[gap:]}"


@cache
def renderer() -> str:
    """Hash of what is placed where in a few prompts: it stands in the receipts of planting and judging, as the coding renderer's does."""
    prompts = ("One day a cat\nran. ", "word", " two words", "Question: 3 hens?\nAnswer:")
    return digest([placed(prompt, {"phrase": "X y", "at": at}, seed, "test", index)
                   for prompt in prompts for at in PLACES for seed in (0, 7) for index in range(12)])
