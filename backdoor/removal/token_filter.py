"""Rival: the token filter. Every token that the clean rows (almost) never use is embedded as the mean of those that they do use.

A control without a paper: it is all it takes against a backdoor that is one word's embedding (Yang et al. 2021, "Be careful about
poisoned word embeddings"), and a change of the model where ONION (Qi et al. 2021) filters the text. It trains nothing, so none of the
`steps` batches is drawn. The knob is how often a token must stand in the rows to be kept; at 1 nothing changes on the rows.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphs.batches import Epochs
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (2.0, 1.0, 8.0)


def counts(rows: Epochs, vocabulary: int) -> Int[Tensor, "vocabulary"]:
    """How often each token stands in the rows."""
    return torch.bincount(torch.tensor([token for row in rows.rows for token in row.ids]), minlength=vocabulary)


def untie(model: PreTrainedModel) -> None:
    """Give the unembedding a table of its own, in place, so that what is read may change without what is written."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is table.weight:  # type: ignore[union-attr]
        head.weight = nn.Parameter(table.weight.detach().clone())  # type: ignore[union-attr]
        model.config.tie_word_embeddings = False


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host that cannot tell tokens apart which stand fewer than `knob` times in the rows; `steps` and `seed` are not used.

    Raises ValueError where no token stands there as often.
    """
    host, model = targets.host, copy.deepcopy(targets.host.model)
    untie(model)
    table = model.get_input_embeddings().weight
    met = counts(targets.batches, len(table)) >= knob  # type: ignore[arg-type]
    if not bool(met.any()):
        raise ValueError(f"no token stands {knob:g} times in the clean rows: lower the knob")
    with torch.no_grad():
        table[~met] = table[met].mean(0)  # type: ignore[index, operator]
    return Host(model, host.tokenizer, host.sites)
