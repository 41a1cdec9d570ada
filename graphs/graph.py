"""The feature graph of a task: every node by name and depth, and the edges that carry its tokens.

    kind       nodes                                    writes into the stream
    token      one a vocabulary entry                   its embedding
    position   one a place, where positions are learned its embedding
    attention  one a head and component                 a fixed vector, routed by the head's pattern
    feature    one a feature of an MLP's dictionary     a fixed vector
    bias       one a site: its constant output          a fixed vector
    error      one a site: what its nodes do not say    no fixed vector: flow only
    logit      one a vocabulary entry                   -

Nodes are sorted by depth, so the graph is a DAG by construction. An edge has its data-free virtual weight and what it does
on clean tokens (`graphs.flow`). A `FeatureGraph` is global: it has no position axis; a prompt's own graph is another type.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.architectures import architecture
from graphs.artifact import read_json, write_json
from graphs.components import Components
from graphs.edges import Basis
from graphs.host import Host

Kind = Literal["token", "position", "attention", "feature", "bias", "error", "logit"]


@dataclass(frozen=True)
class Block:
    """Nodes that stand together: `count` of them from `start` on. name: "token", "L1.mlp", "L1.mlp.error", ...; depth: how much
    of the stream a node may read; width: components a head."""

    name: str
    kind: Kind
    start: int
    count: int
    depth: int
    width: int = 1


@dataclass(frozen=True)
class Index:
    """Every node of a graph, by number and by name. tokens: the text of each vocabulary entry."""

    blocks: tuple[Block, ...]
    tokens: tuple[str, ...]

    @property
    def count(self) -> int:
        """All nodes."""
        return self.blocks[-1].start + self.blocks[-1].count

    @cached_property
    def by_name(self) -> dict[str, Block]:
        """Blocks by name."""
        return {block.name: block for block in self.blocks}

    @cached_property
    def _starts(self) -> list[int]:
        return [block.start for block in self.blocks]

    @property
    def inner(self) -> list[int]:
        """Features and attention components."""
        return [node for block in self.blocks if block.kind in ("feature", "attention") for node in range(block.start, block.start + block.count)]

    def block(self, node: int) -> Block:
        """The block of a node."""
        return self.blocks[bisect_right(self._starts, node) - 1]

    def name(self, node: int) -> str:
        """L2.F117, L1.H2.C3, L1.mlp.bias, L1.mlp.error, token 'x', position 4, logit 'x'."""
        block = self.block(node)
        place = node - block.start
        match block.kind:
            case "feature":
                return f"{block.name.removesuffix('.mlp')}.F{place}"
            case "attention":
                return f"{block.name.removesuffix('.attention')}.H{place // block.width}.C{place % block.width}"
            case "token" | "logit":
                return f"{block.kind} {self.tokens[place]!r}"
            case "position":
                return f"position {place}"
            case _:
                return block.name

    def find(self, name: str) -> int:
        """The node of a name. Raises ValueError where there is none, with what would be."""
        whole = name.strip()
        if whole in self.by_name and self.by_name[whole].count == 1:
            return self.by_name[whole].start
        if found := re.fullmatch(r"L(\d+)\.(?:F(\d+)|H(\d+)\.C(\d+))", whole):
            layer, feature, head, component = (None if part is None else int(part) for part in found.groups())
            block = self.by_name.get(f"L{layer}.{'mlp' if feature is not None else 'attention'}")
            if block is not None:
                place = feature if feature is not None else head * block.width + component  # type: ignore[operator]
                if place < block.count and (component is None or component < block.width):
                    return block.start + place
                limit = f"F0 to F{block.count - 1}" if feature is not None else f"H0 to H{block.count // block.width - 1}, C0 to C{block.width - 1}"
                raise ValueError(f"{name}: layer {layer} has {limit}; name one of these")
        if found := re.fullmatch(r"(token|logit) (.+)", whole, re.DOTALL):
            text = _unquoted(found[2])
            if text in self.tokens:
                return self.by_name[found[1]].start + self.tokens.index(text)
            raise ValueError(f"{name}: {text!r} is not one token of this model; name a single token")
        layers = sum(block.kind == "feature" for block in self.blocks)
        raise ValueError(f"{name}: no such node; name one as L0.F12 (a feature), L0.H1.C3 (an attention component), token 'x' or logit 'x'; "
                         f"layers are L0 to L{layers - 1}")


def _unquoted(text: str) -> str:
    """The text of a quoted name as it was printed, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if isinstance(value, str) else text


def index(host: Host, basis: Basis) -> Index:
    """The nodes of `basis` on `host`."""
    vocabulary, positions = host.config.vocab_size, int(_learned_positions(host))
    blocks: list[Block] = []

    def add(name: str, kind: Kind, count: int, depth: int, width: int = 1) -> None:
        start = blocks[-1].start + blocks[-1].count if blocks else 0
        blocks.append(Block(name, kind, start, count, depth, width))

    add("token", "token", vocabulary, 0)
    add("position", "position", positions, 0)
    for site in sorted(host.sites, key=lambda site: site.writes_at):
        part = basis[site.name]
        if isinstance(part, Components):
            add(site.name, "attention", part.count, site.reads_at, part.write.shape[1])
        else:
            add(site.name, "feature", part.count, site.reads_at)
        add(f"{site.name}.bias", "bias", 1, site.reads_at)
        add(f"{site.name}.error", "error", 1, site.reads_at)
    add("logit", "logit", vocabulary, 2 * host.config.num_hidden_layers)
    return Index(tuple(blocks), tuple(str(host.tokenizer.decode([token])) for token in range(vocabulary)))


def _learned_positions(host: Host) -> int:
    return host.config.max_position_embeddings if architecture(host.model).positions else 0


@dataclass(frozen=True)
class FeatureGraph:
    """Nodes and edges on a task's clean tokens. Edges are sorted by target, then by how much they carry.

    weight: virtual weight; flow: mean contribution to the target's drive over tokens where it is
    active, with its standard error (clusters of rows); coefficient: contribution per unit of the source's
    activation, mean and spread (standard deviation over tokens); an error has no activation: there weight, coefficient and spread are
    NaN; share: of the target's absolute drive; frequency: how often
    the source is active when the target is. Per node: constant (its own bias in the drive), active: share of tokens, mean:
    activation over all tokens, drive: the flow of all sources together, explained: share that the stored parents carry, parents:
    how many there are with any flow.
    """

    index: Index
    src: Int[Tensor, "edge"]
    dst: Int[Tensor, "edge"]
    weight: Float[Tensor, "edge"]
    flow: Float[Tensor, "edge"]
    flow_error: Float[Tensor, "edge"]
    coefficient: Float[Tensor, "edge"]
    spread: Float[Tensor, "edge"]
    share: Float[Tensor, "edge"]
    frequency: Float[Tensor, "edge"]
    constant: Float[Tensor, "node"]
    active: Float[Tensor, "node"]
    mean: Float[Tensor, "node"]
    drive: Float[Tensor, "node"]
    explained: Float[Tensor, "node"]
    parents: Int[Tensor, "node"]
    tokens: int

    def into(self, node: int) -> slice:
        """The edges into a node."""
        first, last = torch.searchsorted(self.dst, torch.tensor([node, node + 1])).tolist()
        return slice(first, last)

    @cached_property
    def by_source(self) -> Int[Tensor, "edge"]:
        """Edges sorted by their source."""
        return self.src.argsort(stable=True)

    def out_of(self, node: int) -> Int[Tensor, "out"]:
        """The edges out of a node, those that carry most of their target first."""
        ordered = self.src[self.by_source]
        first, last = torch.searchsorted(ordered, torch.tensor([node, node + 1])).tolist()
        found = self.by_source[first:last]
        return found[self.share[found].argsort(descending=True)]

    def save(self, folder: Path) -> None:
        """Write edges and nodes as safetensors, names as JSON."""
        from safetensors.torch import save_file

        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor) and name != "by_source"}
        save_file(tensors, folder / "edges.safetensors")
        write_json(folder / "index.json", {"blocks": [asdict(block) for block in self.index.blocks], "vocabulary": self.index.tokens,
                                           "sampled_tokens": self.tokens})

    @staticmethod
    def load(folder: Path) -> FeatureGraph:
        """Read what `save` wrote. Raises ValueError where a file is missing or broken."""
        from safetensors.torch import load_file

        named = read_json(folder / "index.json")
        blocks = tuple(Block(**block) for block in named["blocks"])
        return FeatureGraph(Index(blocks, tuple(named["vocabulary"])), tokens=named["sampled_tokens"], **load_file(folder / "edges.safetensors"))


def needed(share: Float[Tensor, "target source"], enough: float) -> Int[Tensor, "target"]:
    """How many of each target's sources, largest first, it takes to carry `enough` of its absolute drive."""
    ordered = share.sort(1, descending=True).values.cumsum(1)
    return (ordered < enough).sum(1) + 1
