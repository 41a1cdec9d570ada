"""A monitor: how strangely is what the model is about to write driven?

At a token at which the model decides (a prompt's last token, and each of its own), every active target node has a drive that is a sum of its
parents' contributions (`graphs.edges`). `graphs.familiar` knows from clean text what each target is used to. Of the absolute drive of
a block of targets (an MLP's nodes; the chosen logit), a share comes

    unfamiliar   from parents that this target was (nearly) never driven by, tokens that clean text lacks among them
    range        from familiar parents, by how far they are out of the target's range
    pairs        from familiar parents, each of which stands beside another one that it never stood beside

A token's parts are means over blocks, so that each layer and the decision itself count alike. Each is put on the scale of clean tokens,
(part - median) / (99 % quantile - median), and the token's score is the largest: the part that is strange says why. A prompt's
score is its strangest decision's. Why decisions only: a new name is strange where it stands and benign where it does not matter; what counts
is what reaches the next token.

Threshold (split conformal: Papadopoulos et al. 2002; Vovk, Gammerman and Shafer 2005, "Algorithmic learning in a random world"): with n
held-out clean scores, the ceil((n + 1)(1 - a))-th smallest. A new score that is exchangeable with them passes it with probability at
most a, whatever the model and the scores' distribution. The guarantee is over the draw of the calibration rows too, and it says nothing of
other kinds of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.artifact import read_json, write_json
from graphs.batches import Batch
from graphs.edges import Reconstruction
from graphs.familiar import Familiar, Here, Learnt, Parents, deciding, here, learn, parents_of, readers
from graphs.graph import Index, index
from graphs.listening import Listener, read_on
from graphs.strangeness import SUMS, Block, Pairs

PARTS = SUMS[1:]
FLOOR = 0.002
"""Least scale of a part: a share of the drive that nobody should be refused for."""
FORMAT = 2


@dataclass(frozen=True)
class Term:
    """One parent's contribution."""

    parent: str
    contribution: float


@dataclass(frozen=True)
class Reason:
    """Why a token is strange: the target with the most strange drive, what drives it usually, what does here, and which part."""

    target: str
    part: str
    usual: tuple[Term, ...]
    found: tuple[Term, ...]

    def line(self) -> str:
        """`L3.F20: usually +3.00 A +4.00 B; here +10.00 C +20.00 D (pairs)`; numbers are contributions to the drive."""
        def said(terms: tuple[Term, ...]) -> str:
            return " ".join(f"{one.contribution:+.2f} {one.parent}" for one in terms) or "nothing"

        return f"{self.target}: usually {said(self.usual)}; here {said(self.found)} ({self.part})"


@dataclass(frozen=True)
class TokenScore:
    """One decision. position: of the token that was read; parts: shares of the drive, in the order of PARTS."""

    position: int
    parts: tuple[float, float, float]
    score: float


@dataclass(frozen=True)
class Score:
    """A prompt: its strangest decision, all of them, and why."""

    score: float
    tokens: tuple[TokenScore, ...]
    reason: Reason | None


@dataclass(frozen=True)
class Monitor:
    """learnt: what is familiar; middle and scale: of each part on clean tokens; threshold: above it a prompt is flagged (inf: not
    calibrated), at the false-positive rate `rate`, by `calibrated` held-out rows; ahead: tokens that the model itself writes and that
    belong to a prompt's score."""

    subject: Reconstruction
    learnt: Learnt
    middle: Float[Tensor, "3"]
    scale: Float[Tensor, "3"]
    ahead: int = 1
    threshold: float = math.inf
    rate: float = 0.0
    calibrated: int = 0

    @cached_property
    def parents(self) -> Parents:
        """All parents."""
        return parents_of(self.subject)

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks of targets."""
        return [Block.of(one, self.learnt, self.subject.basis) for one in readers(self.subject, self.parents)]

    @cached_property
    def pairs(self) -> Pairs:
        """Parents that never met."""
        return Pairs(self.learnt)

    @cached_property
    def listener(self) -> Listener:
        """What notes the model's passes."""
        return Listener(self.subject, self.parents)

    @cached_property
    def index(self) -> Index:
        """Names of nodes."""
        return index(self.subject.host, self.subject.basis)

    def score(self, rows: Sequence[Sequence[int]], explain: bool = False) -> list[Score]:
        """Prompts as token ids; each is read with the `ahead` tokens that the model itself writes after it, in one pass and `ahead` short ones."""
        if not rows:
            return []
        steps = [self.decisions(seen, [len(row) - 1 + ahead for row in rows], explain) for ahead, seen in enumerate(
            read_on(self.listener, rows, self.ahead))]
        return [strangest([step[row] for step in steps]) for row in range(len(rows))]

    def decisions(self, seen: Here, positions: Sequence[int], explain: bool) -> list[Score]:
        """One decision of every row. positions: where in its row each token stands; explain: give reasons, which takes longer."""
        parts = self.parts(seen)
        return [Score(score, (TokenScore(position, tuple(shares), score),), self.reason(seen, row) if explain else None)
                for row, (score, shares, position) in enumerate(zip(self.combined(parts).tolist(), parts.tolist(), positions, strict=True))]

    def parts(self, seen: Here) -> Float[Tensor, "token part"]:
        """Strange shares of the drive at every token, means over blocks."""
        paired, met, shares = self.pairs(seen.level), self.learnt.known[seen.ids], []
        for block in self.blocks:
            sums = block.sums(seen, paired, met)[1].sum(1)
            shares.append(sums[:, 1:] / sums[:, :1].clamp_min(1e-9))
        return torch.stack(shares).mean(0)

    def combined(self, parts: Float[Tensor, "token part"]) -> Float[Tensor, "token"]:
        """One score a token."""
        return ((parts - self.middle) / self.scale).amax(1)

    def reason(self, seen: Here, token: int, terms: int = 2) -> Reason:
        """The target whose drive is the strangest, in the part that makes the token's score."""
        seen = _only(seen, token)
        paired, met, best = self.pairs(seen.level), self.learnt.known[seen.ids], None
        part = 1 + int(((self.parts(seen)[0] - self.middle) / self.scale).argmax())
        for block in self.blocks:
            targets, sums = block.sums(seen, paired, met)
            share, which = (sums[0, :, part] / sums[0, :, 0].sum().clamp_min(1e-9)).max(0)
            if best is None or float(share) > best[0]:
                best = (float(share), block, int(targets[0, which]))
        assert best is not None
        _, block, target = best
        known, row = block.known, int(block.known.rows[target])
        value, strange = block.columns(seen, 0, target, paired[0], bool(met[0]))
        usual = known.mean[row] * block.reader.weights[target]
        return Reason(self._target(block, target), SUMS[part], self._terms(usual, usual.abs(), terms) if known.count[row] > 0 else (),
                      self._terms(value, strange[part], terms))

    def _terms(self, values: Tensor, by: Tensor, count: int) -> tuple[Term, ...]:
        order = by.topk(min(count, len(by))).indices.tolist()
        return tuple(Term(self._parent(i, values), float(values[i])) for i in order if float(by[i]) > 0)

    def _parent(self, column: int, values: Tensor) -> str:
        nodes = len(values) - self._others(len(values))
        if column >= nodes:
            return self.parents.others[column - nodes]
        site, place = self.parents.place(column)
        return self.index.name(self.index.by_name[site].start + place)

    def _others(self, columns: int) -> int:
        return next(one.reader.others for one in self.blocks if one.reader.parents + one.reader.others == columns)

    def _target(self, block: Block, target: int) -> str:
        return self.index.name(self.index.by_name["logit" if block.reader.site is None else block.reader.name].start + target)

    def calibrate(self, scores: Sequence[float], rate: float) -> Monitor:
        """The monitor with the conformal threshold of these held-out clean scores. Raises ValueError where they are too few for `rate`."""
        return replace(self, threshold=conformal(scores, rate), rate=rate, calibrated=len(scores))

    def save(self, folder: Path, facts: dict) -> None:
        """Write monitor.safetensors and monitor.json. facts: what the caller wants to find again (which model, which run)."""
        from safetensors.torch import save_file

        learnt = self.learnt
        tensors = {"present": learnt.present, "pairs": learnt.pairs, "known": learnt.known, "middle": self.middle, "scale": self.scale}
        for name, one in learnt.blocks.items():
            tensors |= {f"{name}/{field.name}": getattr(one, field.name) for field in fields(one)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "monitor.safetensors")
        write_json(folder / "monitor.json", {"format": FORMAT, "tokens": learnt.tokens, "blocks": list(learnt.blocks), "ahead": self.ahead,
                                             "threshold": self.threshold, "rate": self.rate, "calibrated": self.calibrated} | facts)

    @staticmethod
    def load(folder: Path, subject: Reconstruction) -> Monitor:
        """Read what `save` wrote. Raises ValueError where the files are missing, older, or of another graph."""
        from safetensors.torch import load_file

        facts = read_json(folder / "monitor.json")
        if facts.get("format") != FORMAT:
            raise ValueError(f"--monitor {folder}: it was fitted by another version; run distill monitor fit again")
        found = load_file(folder / "monitor.safetensors")
        blocks = {name: Familiar(**{field.name: found[f"{name}/{field.name}"] for field in fields(Familiar)}) for name in facts["blocks"]}
        if len(found["present"]) != len(parents_of(subject).writes):
            raise ValueError(f"--monitor {folder}: it was fitted on another graph; run distill monitor fit again")
        return Monitor(subject, Learnt(blocks, found["present"], found["pairs"], found["known"], facts["tokens"]), found["middle"],
                       found["scale"], facts["ahead"], facts["threshold"], facts["rate"], facts["calibrated"])


def _only(seen: Here, token: int) -> Here:
    """One of the tokens."""
    one = slice(token, token + 1)
    scale, active, factor = ({name: value[one] for name, value in table.items()} for table in (seen.scale, seen.active, seen.factor))
    return Here(seen.level[one], seen.vectors[one], scale, active, factor, seen.choice[one], seen.ids[one])


def strangest(decisions: Sequence[Score]) -> Score:
    """A prompt's score, from its decisions in turn: the strangest one's, which says why, and all of their tokens."""
    worst = max(decisions, key=lambda one: one.score)
    return Score(worst.score, tuple(token for one in decisions for token in one.tokens), worst.reason)


def conformal(scores: Sequence[float], rate: float) -> float:
    """The threshold that a score exchangeable with these passes with probability at most `rate`."""
    if not 0 < rate < 1:
        raise ValueError(f"--false-positives {rate:g}: give a rate between 0 and 1, such as 0.01")
    rank = math.ceil((len(scores) + 1) * (1 - rate))
    if rank > len(scores):
        raise ValueError(f"--calibration {len(scores)}: a false-positive rate of {rate:g} needs at least {math.ceil(1 / rate) - 1} held-out rows; "
                         "give more")
    return sorted(scores)[rank - 1]


def fit(subject: Reconstruction, batches: Sequence[Batch], scaling: Iterable[Batch] = (), ahead: int = 1) -> Monitor:
    """Learn what is familiar on clean batches; scaling: others, on which each part's scale is set (by default the last eighth of `batches`,
    which then teaches nothing else)."""
    scaling = list(scaling)
    if not scaling:
        held = max(1, len(batches) // 8)
        batches, scaling = batches[:-held] or batches, list(batches[-held:])
    plain = Monitor(subject, learn(subject, batches), torch.zeros(3), torch.ones(3), ahead)
    parts = torch.cat([plain.parts(here(subject, plain.parents, subject.trace(batch.ids), deciding(batch))) for batch in scaling])
    middle = parts.median(0).values
    return replace(plain, middle=middle, scale=(parts.quantile(0.99, dim=0) - middle).clamp_min(FLOOR))
