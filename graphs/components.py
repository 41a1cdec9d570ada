"""Attention components: a layer's value-output map as nodes that its heads route.

    a[h, c](t) = post(t) * sum_s pattern[h](t, s) (read[g(h), c] . x(s) + bias[g(h), c])
    y(t)       = sum_hc a[h, c](t) write[h, c] + constant

A node is (head, component); its read vector belongs to the KV group g(h), its write vector to the head, and the head's own
attention pattern routes it. Patterns sum to 1, so a bias is a constant of the drive. `post` is a frozen post-norm's
1 / scale, where the model has one (its gain is folded into the write vectors).

Any invertible change of basis inside a group leaves the layer as it is, and so any of them compiles exactly into v_proj and
o_proj. `in_metric` picks the one in which the components of a group are uncorrelated on clean text and sorted by what they
write: the singular vectors of (write' read) C^(1/2), C the second moment of clean inputs (cf. Golub and Van Loan, section
6.2; ASVD, Yuan et al. 2023). Keeping the first k of them is then the best rank-k map for clean text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Pattern = Float[Tensor, "row head token source"]


@dataclass(frozen=True)
class Components:
    """The components of one attention layer."""

    read: Float[Tensor, "group component d_in"]
    bias: Float[Tensor, "group component"]
    write: Float[Tensor, "head component d_out"]
    constant: Float[Tensor, "d_out"]

    @property
    def count(self) -> int:
        """Nodes: heads times components."""
        return self.write.shape[0] * self.write.shape[1]

    @property
    def per_group(self) -> int:
        """Heads that share a KV group."""
        return self.write.shape[0] // self.read.shape[0]

    def values(self, x: Float[Tensor, "row token d_in"]) -> Float[Tensor, "row head token component"]:
        """read . x + bias of every node's group, before routing."""
        found = torch.einsum("rtd,gcd->rgtc", x, self.read) + self.bias[:, None]
        return found.repeat_interleave(self.per_group, 1)

    def activations(
        self, x: Float[Tensor, "row source d_in"], pattern: Float[Tensor, "row head token source"], post: Float[Tensor, "row token"] | None = None
    ) -> Float[Tensor, "row token node"]:
        """Activations, nodes in the order (head, component); at the tokens that `pattern` has."""
        routed = (pattern @ self.values(x)).transpose(1, 2).flatten(2)
        return routed if post is None else routed * post[..., None]

    @property
    def writes(self) -> Float[Tensor, "node d_out"]:
        """Write vectors in the order of the nodes."""
        return self.write.flatten(0, 1)

    @property
    def reads(self) -> Float[Tensor, "node d_in"]:
        """Read vectors in the order of the nodes."""
        return self.read.repeat_interleave(self.per_group, 0).flatten(0, 1)

    @property
    def biases(self) -> Float[Tensor, "node"]:
        """Biases in the order of the nodes."""
        return self.bias.repeat_interleave(self.per_group, 0).flatten()

    def keep(self, kept: Bool[Tensor, "group component"]) -> Components:
        """The same layer with every component that is not kept silenced (zeros: the shapes stay, so it compiles as it is)."""
        heads = kept.repeat_interleave(self.per_group, 0)
        return replace(self, read=self.read * kept[..., None], bias=self.bias * kept, write=self.write * heads[..., None])

    def in_metric(self, second: Float[Tensor, "d_in d_in"]) -> Components:
        """The same layer in the basis of the singular vectors of each group's map in the metric of clean inputs.

        second: raw second moment of the inputs. The map of a group stacks its heads' outputs. Computed in float64.
        """
        values, vectors = torch.linalg.eigh(second.double())
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        read, bias, write = self.read.double(), self.bias.double(), self.write.double()
        rank, found = self.read.shape[1], []
        for group in range(len(read)):
            stacked = torch.cat([w.T for w in write[group * self.per_group : (group + 1) * self.per_group]])
            outer, _ = torch.linalg.qr(stacked)
            u, _, _ = torch.linalg.svd(outer.T @ stacked @ read[group] @ root, full_matrices=False)
            basis = (outer @ u)[:, :rank]  # orthonormal in what is written
            into = basis.T @ stacked  # "component component": the old components' part in each new one
            size = (into @ read[group]).norm(dim=1)
            alive = (size > 1e-6 * size.max()).double()[:, None]  # a dropped component comes back as rounding noise
            heads = (basis * alive.T).split(self.write.shape[2])
            found.append((alive * (into @ read[group]), alive[:, 0] * (into @ bias[group]), torch.stack([w.T for w in heads])))
        return Components(
            torch.stack([r for r, _, _ in found]).to(self.read), torch.stack([b for _, b, _ in found]).to(self.read),
            torch.cat([w for _, _, w in found]).to(self.read), self.constant)
