"""Refusing while writing: a logits processor that asks the monitor before every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.monitor import Monitor, Reason, Score


class Refused(RuntimeError):
    """Raised by a `MonitorProcessor` that is asked to raise. row: of the batch; position: token that was read; reason: why."""

    def __init__(self, row: int, position: int, score: float, reason: Reason | None) -> None:
        super().__init__(f"row {row}, token {position}: score {score:.2f}" + (f"; {reason.line()}" if reason else ""))
        self.row, self.position, self.score, self.reason = row, position, score, reason


class MonitorProcessor:
    """Give it to `model.generate(..., logits_processor=LogitsProcessorList([processor]))`.

    Before a token is chosen it scores the last one of every row. Where the score passes the threshold it forces EOS (`action="eos"`, the
    default: the answer ends before a token of it is written), raises `Refused` ("raise"), or only tells (`"tell"`). tell: called with
    (row, score) each time a row is flagged. steps: how many tokens of an answer are looked at (None: all). Every look reads the row from its
    start, without a cache. Raises ValueError for a monitor that was never calibrated. `reset()` before the next prompts.
    """

    def __init__(self, monitor: Monitor, action: Literal["eos", "raise", "tell"] = "eos", steps: int | None = None,
                 tell: Callable[[int, Score], None] | None = None) -> None:
        if not monitor.calibrated:
            raise ValueError("this monitor has no threshold: calibrate it on held-out clean rows (distill monitor fit does)")
        self.monitor, self.action, self.steps, self.tell = monitor, action, steps, tell
        config, tokenizer = monitor.subject.host.config, monitor.subject.host.tokenizer
        end = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.end: int = end[0] if isinstance(end, list) else end
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
        self.flagged: dict[int, Score] = {}
        self.looked = 0

    def reset(self) -> None:
        """Forget what was flagged."""
        self.flagged, self.looked = {}, 0

    def __call__(self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row vocabulary"]:
        """The scores, or EOS alone where a row is refused."""
        if self.steps is None or self.looked < self.steps:
            self._look(input_ids)
        self.looked += 1
        if self.action == "eos" and self.flagged:
            rows, scores = torch.tensor(sorted(self.flagged)), scores.clone()
            scores[rows] = -torch.inf
            scores[rows, self.end] = 0.0
        return scores

    def _look(self, input_ids: Int[Tensor, "row token"]) -> None:
        open_rows = [row for row in range(len(input_ids)) if row not in self.flagged]
        for row, one in zip(open_rows, self.monitor.now([_unpadded(input_ids[row], self.pad) for row in open_rows]), strict=True):
            if one.score > self.monitor.threshold:
                self.flagged[row] = one
                if self.tell is not None:
                    self.tell(row, one)
                if self.action == "raise":
                    raise Refused(row, one.tokens[-1].position, one.score, one.reason)


def _unpadded(ids: Int[Tensor, "token"], pad: int | None) -> list[int]:
    """A row without the pads on its left."""
    found = ids.tolist()
    start = next((i for i, token in enumerate(found) if token != pad), 0)
    return found[start:]
