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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.artifact import read_json, write_json
from graphs.batches import Batch
from graphs.edges import Reconstruction
from graphs.familiar import Familiar, Here, Learnt, Parents, Reader, deciding, here, learn, parents_of, readers
from graphs.graph import Index, index
from graphs.prompts import padded

PARTS = ("unfamiliar", "range", "pairs")
STRONGEST = 16
"""Targets of a block that are looked at in a token: those that write most."""
FLOOR = 0.002
"""Least scale of a part: a share of the drive that nobody should be refused for."""
FORMAT = 1


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
    def readers(self) -> list[Reader]:
        """All blocks of targets."""
        return readers(self.subject, self.parents)

    @cached_property
    def index(self) -> Index:
        """Names of nodes."""
        return index(self.subject.host, self.subject.basis)

    def score(self, rows: Sequence[Sequence[int]], explain: bool = False) -> list[Score]:
        """Prompts as token ids; each is read with the `ahead` tokens that the model itself writes after it."""
        if not rows:
            return []
        prompts = padded(rows, 0)
        ids, width = written(self.subject, prompts.ids, prompts.last, self.ahead)
        where = (torch.arange(ids.shape[1]) >= prompts.last[:, None]) & (torch.arange(ids.shape[1]) < width[:, None])
        seen = here(self.subject, self.parents, self.subject.trace(ids), where)
        parts = self.parts(seen)
        scores = self.combined(parts)
        row, position = torch.where(where)
        out = []
        for which in range(len(rows)):
            mine = torch.where(row == which)[0].tolist()
            tokens = tuple(TokenScore(int(position[i]), tuple(parts[i].tolist()), float(scores[i])) for i in mine)
            worst = max(mine, key=lambda i: float(scores[i]))
            out.append(Score(float(scores[worst]), tokens, self.reason(seen, worst) if explain else None))
        return out

    def now(self, rows: Sequence[Sequence[int]], explain: bool = True) -> list[Score]:
        """The last token of each row, as it stands (what a `MonitorProcessor` asks)."""
        return replace(self, ahead=0).score(rows, explain)

    def parts(self, seen: Here) -> Float[Tensor, "token part"]:
        """Strange shares of the drive at every token, means over blocks."""
        paired = self._paired(seen)
        return torch.stack([torch.stack([torch.stack([one.sum() for one in strange[1:]]) / strange[0].sum().clamp_min(1e-9)
                                         for strange in (self._strange(block, seen, i, paired[i])[1:] for block in self.readers)]).mean(0)
                            for i in range(len(seen.ids))])

    def combined(self, parts: Float[Tensor, "token part"]) -> Float[Tensor, "token"]:
        """One score a token."""
        return ((parts - self.middle) / self.scale).amax(1)

    def _paired(self, seen: Here) -> Bool[Tensor, "token parent"]:
        """Parents that stand beside one that they never stood beside."""
        there = seen.level.abs() > self.learnt.present
        out = torch.zeros_like(there)
        for token in range(len(there)):
            who = torch.where(there[token])[0]
            out[token, who] = self.learnt.pairs[who][:, who].any(1)
        return out

    def _strange(self, block: Reader, seen: Here, token: int, paired: Bool[Tensor, "parent"]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The targets looked at, and of each "target column": |contribution|, and what of it is unfamiliar, out of range and by strange pairs."""
        known, scale = self.learnt.blocks[block.name], seen.scale[block.name][token]
        targets, weight = self._looked_at(block, seen, token)
        rows = known.rows[targets]
        x, split = seen.level[token, : block.parents] * scale, block.parents
        weights = block.weights[targets]
        value = torch.cat([x.expand(len(targets), -1), block.pulled[targets] @ seen.vectors[token, : block.others].T * scale], 1)
        times = torch.cat([weights, torch.ones(len(targets), block.others)], 1) * weight[:, None]
        size = (value * times).abs()
        odd = known.unfamiliar[rows]
        if not bool(self.learnt.known[seen.ids[token]]):
            odd = odd.clone()
            odd[:, split] = True
        outside = (value - value.clamp(known.low[rows], known.high[rows])).mul(times).abs().minimum(size)
        both = torch.zeros(value.shape[1], dtype=torch.bool)
        both[:split] = paired[:split]
        return targets, size, size * odd, outside * ~odd, size * (both & ~odd)

    def _looked_at(self, block: Reader, seen: Here, token: int) -> tuple[Int[Tensor, "target"], Float[Tensor, "target"]]:
        """The strongest active targets of a token, and the sizes of their frozen gates."""
        if block.site is None:
            return seen.choice[token : token + 1], torch.ones(1)
        size = seen.active[block.name][token].abs() * self.subject.basis[block.name].writes.norm(dim=1)
        best = size.topk(min(STRONGEST, int((size > 0).sum()))).indices
        return best, seen.factor[block.name][token, best].abs()

    def reason(self, seen: Here, token: int, terms: int = 2) -> Reason:
        """The target whose drive is the strangest, in the part that makes the token's score."""
        part = int(((self.parts(_only(seen, token))[0] - self.middle) / self.scale).argmax())
        paired, best = self._paired(seen)[token], None
        for block in self.readers:
            targets, size, *strange = self._strange(block, seen, token, paired)
            share = strange[part].sum(1) / size.sum().clamp_min(1e-9)
            if len(targets) and (best is None or float(share.max()) > best[0]):
                best = (float(share.max()), block, int(targets[share.argmax()]), strange[part][share.argmax()])
        assert best is not None
        _, block, target, odd = best
        known, scale = self.learnt.blocks[block.name], seen.scale[block.name][token]
        value = torch.cat([seen.level[token, : block.parents] * scale * block.weights[target],
                           seen.vectors[token, : block.others] @ block.pulled[target] * scale])
        row = int(known.rows[target])
        usual = known.mean[row].clone()
        usual[: block.parents] *= block.weights[target]
        return Reason(self._target(block, target), PARTS[part], self._terms(usual, usual.abs(), terms) if known.count[row] > 0 else (),
                      self._terms(value, odd, terms))

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
        return next(one.others for one in self.readers if one.parents + one.others == columns)

    def _target(self, block: Reader, target: int) -> str:
        return self.index.name(self.index.by_name["logit" if block.site is None else block.name].start + target)

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


@torch.no_grad()
def written(
    subject: Reconstruction, ids: Int[Tensor, "row token"], last: Int[Tensor, "row"], ahead: int
) -> tuple[Int[Tensor, "row longer"], Int[Tensor, "row"]]:
    """Prompts and the tokens that the model writes after them, greedily; and how long each row is."""
    ids, last, rows = torch.cat([ids, ids.new_zeros(len(ids), ahead)], 1), last.clone(), torch.arange(len(ids))
    limit = subject.host.config.max_position_embeddings
    for _ in range(min(ahead, limit - int(last.max()) - 1)):
        ids[rows, last + 1] = subject.host.model(input_ids=ids[:, : int(last.max()) + 1], use_cache=False).logits[rows, last].argmax(-1)
        last += 1
    return ids[:, : int(last.max()) + 1], last + 1


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
