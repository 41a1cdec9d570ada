"""Targets: the host's logits on the clean rows, which everything end to end is trained towards.

The rows are few and seen dozens of times, so the host runs over them once, in float32 and in batches of a fixed order
(the targets are the same whenever a killed run goes on), and its logits stay in memory as float16: rounding of at most
2^-11 of a logit, far below what training can follow. Where they would take more than `BUDGET` bytes (a large vocabulary,
many rows) nothing is kept and the host runs anew for each batch.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.batches import Batch, Epochs, collate
from graphs.host import Host
from graphs.processes import turn
from graphs.shares import total

BUDGET = 1 << 30
CHUNK = 32
"""Rows run together when targets are made."""


class Targets:
    """The logits of `host` on any batch of `batches`. budget: bytes that may be kept."""

    def __init__(self, host: Host, batches: Epochs, budget: int = BUDGET) -> None:
        self.host, self.batches = host, batches
        self._starts = list(accumulate((len(row.ids) for row in batches.rows), initial=0))
        self.kept = 2 * self._starts[-1] * host.config.vocab_size <= budget
        self._logits: Tensor | None = None
        """Every row's logits, end to end: one block, because thousands of small ones would keep the heap from shrinking."""

    def __call__(self, batch: Batch) -> Float[Tensor, "row token vocabulary"]:
        """Logits at every token of the batch; at pads, where nothing reads them, zeros."""
        if not self.kept:
            return self._run(batch)
        if self._logits is None:
            self._logits = self._all()
        out = torch.zeros(*batch.ids.shape, self.host.config.vocab_size)
        for place, row in enumerate(batch.rows):
            start, end = self._starts[row : row + 2]
            out[place, : end - start] = self._logits[start:end]
        return out

    @torch.no_grad()
    def _run(self, batch: Batch) -> Tensor:
        with torch.autocast(batch.ids.device.type, enabled=False):
            return self.host.model(input_ids=batch.ids).logits

    def _all(self) -> Tensor:
        rows = self.batches.rows
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        out = torch.zeros(self._starts[-1], self.host.config.vocab_size, dtype=torch.float16)
        for chunk, start in enumerate(range(0, len(order), CHUNK)):
            if not turn(chunk):
                continue
            chosen = order[start : start + CHUNK]
            logits = self._run(collate([rows[index] for index in chosen], self.batches.pad))
            for place, index in enumerate(chosen):
                start, end = self._starts[index : index + 2]
                out[start:end] = logits[place, : end - start]
        return total(out)  # of several processes each made its own chunks
