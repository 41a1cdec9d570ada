"""How large a checkpoint is, and how fast it writes.

Two sizes, because a compiled circuit has both: *stored* is what the file holds, *live* is what is not zero (a layer
padded to the widest, or a unit that was cut, is stored and not live). Embeddings are counted apart: in a small model
they are most of the parameters, and no circuit removes them.

Speed is a ratio or it is nothing: absolute numbers belong to the machine and its moment. The models take turns within
every repeat, so what slows the machine down slows all of them, and repeat r of one model pairs with repeat r of another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import nn

from evals.generate import decode, greedy, prompt_ids
from graphs.host import Host

BATCH = 32
"""Prompts decoded together when speed is measured."""


@dataclass(frozen=True)
class Size:
    """Counts of parameters. stored: all but embeddings; live: those of `stored` that are not zero; embeddings: input
    embedding and output head; bytes: all of them, in the dtype they are held in. A tied tensor counts once."""

    stored: int
    live: int
    embeddings: int
    bytes: int


def parameters(model: nn.Module) -> Size:
    """The size of a Hugging Face model."""
    return replace(held(model), live=sum(int(torch.count_nonzero(p)) for p in _body(model)[0]))


def held(model: nn.Module) -> Size:
    """The size by shapes alone, so that a model on the meta device has one; live is what is stored."""
    body, tables = _body(model)
    stored = sum(p.numel() for p in body)
    return Size(stored, stored, sum(p.numel() for p in tables), sum(p.numel() * p.element_size() for p in (*body, *tables)))


def _body(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters, embedding tables apart; a tied tensor once."""
    ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]  # type: ignore[operator]
    tables = {id(weight): weight for weight in ends}
    body = [p for p in model.parameters() if id(p) not in tables]  # parameters() yields a tied tensor once
    return body, list(tables.values())


def speed(hosts: Mapping[str, Host], prompts: Sequence[str], new_tokens: int = 64, repeats: int = 5) -> dict[str, list[float]]:
    """Tokens written per second (prompt reading included), for each model and repeat, by greedy decoding of 32 prompts.

    Every model writes exactly `new_tokens` for each prompt, EOS or not, so that speed does not depend on what it says.
    Fewer than 32 prompts are repeated. One warm-up each. Raises ValueError for no prompts, or no tokens or repeats.
    """
    if not prompts or new_tokens < 1 or repeats < 1:
        raise ValueError(f"speed() got {len(prompts)} prompts, {new_tokens} new tokens and {repeats} repeats: give at least one of each")
    texts = list(islice(cycle(prompts), BATCH))
    ids = {name: prompt_ids(host, texts) for name, host in hosts.items()}
    for name, host in hosts.items():
        decode(host, ids[name], min(new_tokens, 4), greedy, None)
    rates: dict[str, list[float]] = {name: [] for name in hosts}
    for _ in range(repeats):
        for name, host in hosts.items():
            start = time.perf_counter()
            decode(host, ids[name], new_tokens, greedy, None)  # ends in a copy to the CPU, so the work is done when it returns
            rates[name].append(BATCH * new_tokens / (time.perf_counter() - start))
    return rates
