"""Token nodes: those that clean rows hold, and a model to which all others are one.

A vocabulary entry is a node like any other: what it writes into the stream is its row of the embedding, and a logit reads through its row
of the unembedding. Of an entry that no clean row holds nothing was seen, so a circuit need not hold it. All such entries then have one and
the same row, the median of theirs, coordinate by coordinate: what the model takes for a word that it hardly knows, which a few planted rows
do not move (the mean of the rows that *are* kept reads as no word does, and breaks the answer: LOG.md). With tied tables one row is both.
What was planted in such rows, the embedding of a rare trigger or the unembedding of a payload's own words, is gone, and so is what the
model knew of words that clean rows lack. Rows that a suspect model wrote itself vouch for no token: with them many a planted one stays.
`--vocabulary task` of `distill export` leaves such rows out of the file instead; here the ids and the tokenizer stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from graphs.architectures import embeddings
from graphs.batches import Encoded
from graphs.host import Host


def seen_in(rows: Iterable[Encoded], host: Host) -> list[int]:
    """The entries that the rows hold, and the tokenizer's special ones, in order."""
    special = {number for number in host.tokenizer.all_special_ids if number < host.config.vocab_size}
    return sorted(special | {number for row in rows for number in row.ids})


@torch.no_grad()
def merge_others(host: Host, kept: Sequence[int]) -> None:
    """Put every entry but the `kept` ones at their median, in place, in both tables. Raises ValueError where none is kept."""
    if not kept:
        raise ValueError("no token is kept: give clean rows with at least one")
    for table in {id(p): p for end in embeddings(host.model)[:2] for p in end.parameters()}.values():
        others = torch.ones(len(table), dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
        if bool(others.any()):
            table[others] = table[others].median(0).values
