"""How closely one checkpoint follows another, token by token.

On the rows' own completions (teacher forcing: both models read the same text), at every position that predicts a
completion token, EOS included: KL(reference || host), what is lost by coding the reference's predictions with the
host's, and top-1 agreement, whether greedy decoding would take the same step. Accuracy can be kept by a model that computes
something else; these cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evals.generate import context, predictions, row_totals
from evals.tasks import Row
from graphs.batches import encode
from graphs.host import Host
from graphs.shares import total


@dataclass(frozen=True)
class Fidelity:
    """Per row. kl: mean KL(reference || host) in nats per completion token; agreement: share of equal top-1 tokens."""

    kl: list[float]
    agreement: list[float]


def compare(host: Host, reference: Host, rows: Sequence[Row], batch: int = 64) -> Fidelity:
    """Fidelity of `host` to `reference` on `rows`. Raises ValueError where the two do not share a vocabulary."""
    if host.config.vocab_size != reference.config.vocab_size or host.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError("the two models do not share a vocabulary, so their predictions cannot be compared: give checkpoints with one tokenizer")
    encoded = encode(host.tokenizer, [(row.prompt, row.completion) for row in rows], min(context(host), context(reference))) if rows else []
    kl, agreement, count = (torch.zeros(len(encoded), dtype=torch.float64) for _ in range(3))
    for ours, theirs in zip(predictions(host, encoded, batch), predictions(reference, encoded, batch), strict=True):
        log_p, log_q = theirs.logits.log_softmax(-1), ours.logits.to(theirs.logits.device).log_softmax(-1)
        kl += row_totals((log_p.exp() * (log_p - log_q)).sum(-1), theirs.row, len(encoded))
        agreement += row_totals((log_p.argmax(-1) == log_q.argmax(-1)).double(), theirs.row, len(encoded))
        count += row_totals(torch.ones_like(theirs.row, dtype=torch.float64), theirs.row, len(encoded))
    kl, agreement, count = total(kl), total(agreement), total(count)  # of several processes each has seen its share of the rows
    return Fidelity((kl / count).tolist(), (agreement / count).tolist())
