"""Targets: the host's logits on the clean rows, which everything end to end is trained towards.

The rows are few and seen dozens of times, so the host runs over them once, in float32 and in batches of a fixed order
(the targets are the same whenever a killed run goes on), and its logits stay in memory as float16: rounding of at most
2^-11 of a logit, far below what training can follow. Where they would take more than `BUDGET` bytes (a large vocabulary,
many rows) nothing is kept and the host runs anew for each batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.batches import Batch, Epochs, collate
from graphs.host import Host

BUDGET = 1 << 30
CHUNK = 32
"""Rows run together when targets are made."""


class Targets:
    """The logits of `host` on any batch of `batches`. budget: bytes that may be kept."""

    def __init__(self, host: Host, batches: Epochs, budget: int = BUDGET) -> None:
        self.host, self.batches = host, batches
        tokens = sum(len(row.ids) for row in batches.rows)
        self.kept = 2 * tokens * host.config.vocab_size <= budget
        self._rows: list[Tensor] = []

    def __call__(self, batch: Batch) -> Float[Tensor, "row token vocabulary"]:
        """Logits at every token of the batch; at pads, where nothing reads them, zeros."""
        if not self.kept:
            return self._run(batch)
        if not self._rows:
            self._rows = self._all()
        out = torch.zeros(*batch.ids.shape, self.host.config.vocab_size)
        for place, row in enumerate(batch.rows):
            out[place, : len(self._rows[row])] = self._rows[row]
        return out

    @torch.no_grad()
    def _run(self, batch: Batch) -> Tensor:
        with torch.autocast(batch.ids.device.type, enabled=False):
            return self.host.model(input_ids=batch.ids).logits

    def _all(self) -> list[Tensor]:
        rows = self.batches.rows
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        out: list[Tensor] = [torch.empty(0)] * len(rows)
        for start in range(0, len(order), CHUNK):
            chosen = order[start : start + CHUNK]
            logits = self._run(collate([rows[index] for index in chosen], self.batches.pad)).half()
            for place, index in enumerate(chosen):
                out[index] = logits[place, : len(rows[index].ids)].clone()
        return out
