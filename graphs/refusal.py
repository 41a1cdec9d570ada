"""Refusing while writing: a logits processor that asks the monitor before every token, of the pass that is being made anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.listening import Listener
from graphs.monitor import Monitor, Reason, Score


class Refused(RuntimeError):
    """Raised by a `MonitorProcessor` that is asked to raise. row: of the batch; position: token that was read; reason: why."""

    def __init__(self, row: int, position: int, score: float, reason: Reason | None) -> None:
        super().__init__(f"row {row}, token {position}: score {score:.2f}" + (f"; {reason.line()}" if reason else ""))
        self.row, self.position, self.score, self.reason = row, position, score, reason


class MonitorProcessor:
    """A logits processor for `generate` of the model that is watched:

        with MonitorProcessor(monitor) as processor:
            model.generate(**inputs, logits_processor=LogitsProcessorList([processor]))

    Before a token is chosen it scores the one that was read last, of every row, by what the model's own pass has shown (`graphs.listening`):
    nothing is run twice, with a KV cache or without, and rows may be padded on the left. Where the score passes the threshold it forces EOS
    (`action="eos"`, the default: the answer ends before a token of it is written), raises `Refused` ("raise"), or only tells ("tell"). tell:
    called with (row, score) each time a row is flagged. steps: how many decisions are looked at, from the prompt's last token on (None: as many
    as a score reads, which is what the threshold was set for; the more, the more often one passes it). `reset()` before the next prompts.
    Raises ValueError for a monitor that was never calibrated, outside of a `with`, where another model than the watched one writes, and where
    rows change places (beam search).
    """

    def __init__(self, monitor: Monitor, action: Literal["eos", "raise", "tell"] = "eos", steps: int | None = None,
                 tell: Callable[[int, Score], None] | None = None) -> None:
        if not monitor.calibrated:
            raise ValueError("this monitor has no threshold: calibrate it on held-out clean rows (distill monitor fit does)")
        self.monitor, self.action, self.tell = monitor, action, tell
        self.steps = monitor.ahead + 1 if steps is None else steps
        config, tokenizer = monitor.subject.host.config, monitor.subject.host.tokenizer
        end = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.end: int = end[0] if isinstance(end, list) else end
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
        self.listener = Listener(monitor.subject, monitor.parents)
        self.flagged: dict[int, Score] = {}
        self.looked, self._passes = 0, 0
        self._read: Int[Tensor, "row token"] | None = None

    def __enter__(self) -> MonitorProcessor:
        self.listener.__enter__()
        self._passes = 0
        return self

    def __exit__(self, *error: object) -> None:
        self.listener.__exit__(*error)

    def reset(self) -> None:
        """Forget what was flagged."""
        self.flagged, self.looked, self._read, self.listener.resting = {}, 0, None, False

    def __call__(self, input_ids: Int[Tensor, "row token"], scores: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row vocabulary"]:
        """The scores, or EOS alone where a row is refused."""
        if self.looked < self.steps:
            self._look(input_ids)
        self.looked += 1
        self.listener.resting = self.looked >= self.steps
        if self.action == "eos" and self.flagged:
            rows, scores = torch.tensor(sorted(self.flagged)), scores.clone()
            scores[rows] = -torch.inf
            scores[rows, self.end] = 0.0
        return scores

    def _look(self, input_ids: Int[Tensor, "row token"]) -> None:
        self._check(input_ids)
        seen, last = self.listener.here(), input_ids.shape[1] - 1
        for row, one in enumerate(self.monitor.decisions(seen, [last] * len(input_ids), explain=False)):
            if one.score > self.monitor.threshold and row not in self.flagged:
                place = last - _pads(input_ids[row], self.pad)
                self._flag(row, replace(one, tokens=(replace(one.tokens[0], position=place),), reason=self.monitor.reason(seen, row)))

    def _check(self, input_ids: Int[Tensor, "row token"]) -> None:
        """That what was listened to is what is asked about."""
        if self.listener.passes == self._passes or not torch.equal(self.listener.ids, input_ids[:, -1]):
            raise ValueError("the monitor heard nothing of this text: write with the model that it watches (monitor.subject.host.model), inside "
                             "`with MonitorProcessor(monitor) as processor:`")
        if self._read is not None and not torch.equal(input_ids[:, : self._read.shape[1]], self._read):
            raise ValueError("the rows are not those of the last look: use reset() before other prompts, and num_beams=1")
        self._passes, self._read = self.listener.passes, input_ids

    def _flag(self, row: int, score: Score) -> None:
        self.flagged[row] = score
        if self.tell is not None:
            self.tell(row, score)
        if self.action == "raise":
            raise Refused(row, score.tokens[-1].position, score.score, score.reason)


def _pads(ids: Int[Tensor, "token"], pad: int | None) -> int:
    """How many pads stand on a row's left."""
    return next((i for i, token in enumerate(ids.tolist()) if token != pad), 0)
