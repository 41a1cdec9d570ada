"""Dictionaries: what stands at an MLP site, as nodes with a read vector, a gate and a write vector.

    drive_f = m_f(x) * (read_f . x + bias_f)        m_f: 1, or the frozen gate of a gated neuron
    a_f     = gate(drive_f)
    y       = sum_f a_f write_f + constant

A dictionary is a tuple of parts with a gate each, so a skip transcoder is (ReLU features, Identity nodes) and the model's
own neurons are a dictionary like any other, with no reconstruction error. Feature is the first axis of every weight.

    gate       a(drive)                  from
    ReLU       max(drive, 0)             Dunefsky et al. 2024
    JumpReLU   drive if > threshold      Rajamanoharan et al. 2024, section 3
    TopK       relu of the k largest     Gao et al. 2024, section 2.3
    Identity   drive                     a rank-r skip is r such nodes, so an edge stays one hop (Paulo et al. 2025)
    Act        the model's activation    plain neurons
    Gated      drive, m = act(gate . x)  a gated MLP's neurons; an edge is exact with the gate frozen
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """Positive part."""

    def __call__(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations."""
        return torch.relu(drive)


@dataclass(frozen=True)
class JumpReLU:
    """The drive itself above a threshold a feature, else 0."""

    threshold: Float[Tensor, "feature"]

    def __call__(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations."""
        return drive * (drive > self.threshold)


@dataclass(frozen=True)
class TopK:
    """The positive part of the k largest drives of a token."""

    k: int

    def __call__(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations."""
        top = drive.topk(min(self.k, drive.shape[-1]), dim=-1)
        return torch.zeros_like(drive).scatter(-1, top.indices, torch.relu(top.values))


@dataclass(frozen=True)
class Identity:
    """No gate: a direction of a linear skip."""

    def __call__(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations."""
        return drive


@dataclass(frozen=True)
class Act:
    """A stock activation by its Hugging Face name."""

    name: str

    def __call__(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations."""
        from transformers.activations import ACT2FN

        return ACT2FN[self.name](drive)


@dataclass(frozen=True)
class Gated:
    """A gated neuron: the drive is act(gate . x + gate bias) times the linear read, its gate frozen where edges are taken."""

    activation: str
    read: Float[Tensor, "feature d_in"]
    bias: Float[Tensor, "feature"]

    def __call__(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Activations: the drive holds the gate already."""
        return drive

    def open(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """The gate's factor."""
        return Act(self.activation)(torch.nn.functional.linear(x, self.read, self.bias))


Gate = ReLU | JumpReLU | TopK | Identity | Act | Gated


@dataclass(frozen=True)
class Part:
    """Nodes that share a gate."""

    read: Float[Tensor, "feature d_in"]
    bias: Float[Tensor, "feature"]
    write: Float[Tensor, "feature d_out"]
    gate: Gate = ReLU()

    def factor(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"] | None:
        """What multiplies the linear read; None where nothing does."""
        return self.gate.open(x) if isinstance(self.gate, Gated) else None

    def drive(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """What enters the gate."""
        linear, factor = torch.nn.functional.linear(x, self.read, self.bias), self.factor(x)
        return linear if factor is None else linear * factor

    def keep(self, kept: Int[Tensor, "kept"]) -> Part:
        """The kept nodes."""
        gate = self.gate
        match gate:
            case JumpReLU():
                gate = JumpReLU(gate.threshold[kept])
            case Gated():
                gate = Gated(gate.activation, gate.read[kept], gate.bias[kept])
        return Part(self.read[kept], self.bias[kept], self.write[kept], gate)


@dataclass(frozen=True)
class Dictionary:
    """The parts at one site and the constant that is added to what they write."""

    parts: tuple[Part, ...]
    constant: Float[Tensor, "d_out"]

    @property
    def count(self) -> int:
        """Nodes in all parts."""
        return sum(len(part.read) for part in self.parts)

    @property
    def reads(self) -> Float[Tensor, "feature d_in"]:
        """Every node's read vector."""
        return torch.cat([part.read for part in self.parts])

    @property
    def biases(self) -> Float[Tensor, "feature"]:
        """Every node's bias."""
        return torch.cat([part.bias for part in self.parts])

    @property
    def writes(self) -> Float[Tensor, "feature d_out"]:
        """Every node's write vector."""
        return joined([part.write for part in self.parts], 0)

    def factor(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """m of every node: 1 where the gate is not frozen into the drive."""
        found = [part.factor(x) for part in self.parts]
        ones = [x.new_ones(*x.shape[:-1], len(part.read)) if factor is None else factor for part, factor in zip(self.parts, found, strict=True)]
        return torch.cat(ones, -1)

    def drive(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Every node's drive."""
        return torch.cat([part.drive(x) for part in self.parts], -1)

    def activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Every node's activation."""
        return torch.cat([part.gate(part.drive(x)) for part in self.parts], -1)

    def opened(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch feature"], Float[Tensor, "*batch feature"]]:
        """Every node's activation and m, gates computed once."""
        active, factors = [], []
        for part in self.parts:
            linear, factor = torch.nn.functional.linear(x, part.read, part.bias), part.factor(x)
            active.append(part.gate(linear if factor is None else linear * factor))
            factors.append(torch.ones_like(linear) if factor is None else factor)
        return joined(active, -1), joined(factors, -1)

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the dictionary writes in the MLP's place."""
        return self.activations(x) @ self.writes + self.constant


def joined(tensors: list[Tensor], dim: int) -> Tensor:
    """Side by side; one alone as it is, for a dictionary mostly has one part and is asked at every token."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def nothing(d_in: int, d_out: int) -> Dictionary:
    """A dictionary without nodes: all that its site writes is error."""
    return Dictionary((Part(torch.zeros(0, d_in), torch.zeros(0), torch.zeros(0, d_out)),), torch.zeros(d_out))


def skip(matrix: Float[Tensor, "d_out d_in"], rank: int | None = None) -> Part:
    """A linear skip y += matrix x as Identity nodes, by its singular vectors: full, or the best of `rank`."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    count = len(s) if rank is None else rank
    root = s[:count].sqrt()
    return Part(v[:count] * root[:, None], matrix.new_zeros(count), u.T[:count] * root[:, None], Identity())
