"""Running a circuit edge by edge: every target reads its kept edges and nothing else.

The run is in node space. With V the virtual weights of `graphs.edges`, a target reads at each token

    drive_t = sum_s V[t, s] a_s / scale + constant_t

over every source s that writes before it, instead of reading the residual stream; what it computes from the drive is unchanged. An
edge is a pair (source, target) and `kept` is a matrix of them. What a cut edge would have carried is held at its mean on clean tokens
(`mean`; zeros hold it at nothing), as a dropped node is: a constant of the target. The scale is that of the *shared* stream, in which
every node writes whole, so that with every edge kept the run computes what the circuit, and its compiled checkpoint, computes.

    targets                                     read by
    features (and directions of a skip)         the MLP's dictionary
    components of a KV group's value map        all heads of the group: a cut is a decision of the group, as a dropped component is
    queries and keys, one a dimension           only with `routing`; otherwise they read the whole stream, as graphs hold patterns fixed
    logits, against the mean of all             that mean, which changes no probability, is read whole

    sources                                     activation
    tokens, one a vocabulary entry              1 at its places, so that its edges are a look-up table
    features, attention components (a head's)   their own
    output biases, one a site                   1

What learned positions put into the stream, and what a gated neuron's gate reads, is not cut. A cached value is a component's scalar, so
the KV cache of a stock model, and everything that decodes with one, works as it is. Weights are computed from the circuit's own at each
pass (and gradients reach them: `graphs.edge_prune`) until `fix` stores them, a matrix a site: dense, or as compressed rows where few
edges are left (`SPARSE`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from graphs.architectures import architecture, embeddings, install, norm, or_zeros
from graphs.attention import Attention, projection
from graphs.host import Host
from graphs.replace import Replacement
from graphs.transcoder import Transcoder

SPARSE = 0.1
"""Share of a site's weights below which its product with compressed rows is the faster one (measured on one core: level at .1 to .2)."""
LOGITS = "logits"
"""Name of the logits among targets."""
Edges = Mapping[str, Bool[Tensor, "_target _source"]]
"""A set of edges, by targets' name. Columns: vocabulary entries, then each site's nodes and its bias, in order of depth."""


@dataclass
class Stream:
    """What one forward pass has written so far. active: of each site, activations and a one for its bias; position: what learned positions
    put in; inverse: 1 / scale by norm; writes: write vectors of all sources, where weights are computed anew."""

    ids: Int[Tensor, "row token"]
    active: list[Float[Tensor, "row token source"]] = field(default_factory=list)
    position: Float[Tensor, "row token d"] | None = None
    inverse: dict[str, Float[Tensor, "row token"]] = field(default_factory=dict)
    writes: Float[Tensor, "source d"] | None = None

    def add(self, active: Float[Tensor, "row token node"]) -> None:
        """A site's activations."""
        self.active.append(torch.cat([active, active.new_ones(*active.shape[:-1], 1)], -1))


@dataclass(frozen=True)
class Weights:
    """What a reader multiplies with. table: of tokens; inner: of nodes and biases, dense or as compressed rows; shift: what does not depend
    on the text; pulled: read vectors, for what learned positions put in."""

    table: Float[Tensor, "vocabulary target"]
    inner: Tensor
    shift: Float[Tensor, "target"]
    pulled: Float[Tensor, "target d"]


class Reader(nn.Module):
    """Targets that read the stream through one norm. sites: how many sites, in order of depth, are among their sources;
    reads: read vectors and biases, live; kept, mean: see the module; gate: while gates are learned, how far each edge is open."""

    kept: Bool[Tensor, "target source"]
    mean: Float[Tensor, "source"]

    def __init__(self, run: EdgeModel, path: str, sites: int, reads: Callable[[], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._run, self.path, self.sites, self.reads = [run], path, sites, reads  # in a list: the run holds its readers, not they it
        targets, sources = len(reads()[1]), run.count(sites)
        self.register_buffer("kept", torch.ones(targets, sources, dtype=torch.bool), persistent=False)
        self.register_buffer("mean", torch.zeros(sources), persistent=False)
        self.gate: Float[Tensor, "target source"] | None = None
        self.fixed: Weights | None = None
        self.watch = False
        self.last: Tensor | None = None
        """The targets' drives in the last pass; set only while `watch` is on."""

    def virtual(self) -> tuple[Float[Tensor, "target source"], Float[Tensor, "target"], Float[Tensor, "target d"]]:
        """V of every edge, kept or not; the targets' own constants; their read vectors on the stream."""
        run, through, (read, bias) = self._run[0], norm(self._run[0].model, self.path), self.reads()
        pulled = through.pulled(read)
        return pulled @ run.writes()[: self.kept.shape[1]].T, bias + read @ through.offset, pulled

    def weights(self) -> Weights:
        """Weights of the kept edges."""
        whole, own, pulled = self.virtual()
        open_, vocabulary = self.kept if self.gate is None else self.gate, self._run[0].vocabulary
        held = whole * open_
        return Weights(held[:, :vocabulary].T, held[:, vocabulary:], own + (whole - held) @ self.mean, pulled)

    def fix(self) -> None:
        """Store the weights, in whichever form is the faster."""
        found = self.weights()
        sparse = float((found.inner != 0).float().mean()) < SPARSE
        self.fixed = Weights(found.table.contiguous(), found.inner.to_sparse_csr() if sparse else found.inner, found.shift, found.pulled)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch target"]:
        """Every target's drive. x: what a dense model would read; only its shape is looked at, for a model may ask for its last tokens alone."""
        stream, held = self._run[0].stream, self.fixed or self.weights()
        last = x.shape[-2] if x.ndim == 3 else stream.ids.shape[1]
        active = [one[:, -last:] for one in stream.active[: self.sites]]
        total = held.table[stream.ids[:, -last:]]
        if active:
            total = total + _product(torch.cat(active, -1), held.inner)
        if stream.position is not None:
            total = total + stream.position[:, -last:] @ held.pulled.T
        drive = total * stream.inverse[self.path][:, -last:, None] + held.shift
        if self.watch:
            self.last = drive
        return drive.reshape(*x.shape[:-1], -1)


def _product(active: Float[Tensor, "row token source"], inner: Tensor) -> Float[Tensor, "row token target"]:
    """active times the weights, dense or compressed."""
    if inner.layout == torch.strided:
        return nn.functional.linear(active, inner)
    return (inner @ active.flatten(0, 1).T).T.unflatten(0, active.shape[:2])


class _Linear(nn.Linear):
    """A projection of attention, or the unembedding, that a reader stands in for. common: what all outputs read whole."""

    def __init__(self, linear: nn.Linear, reader: Reader, common: Float[Tensor, "d"] | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.reader, self.common = linear.weight, linear.bias, reader, common

    def forward(self, input: Tensor) -> Tensor:
        """The reader's drives."""
        drive = self.reader(input)
        return drive if self.common is None else drive + (input @ self.common.to(input.dtype))[..., None]


class _MLP(nn.Module):
    """A dictionary whose nodes read through a reader."""

    def __init__(self, run: EdgeModel, part: Transcoder, reader: Reader) -> None:
        super().__init__()
        self._run, self.part, self.reader, self.parts = [run], part, reader, part.dictionary().parts

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_out"]:
        """What the dictionary writes."""
        drives = self.reader(x).split([len(part.read) for part in self.parts], -1)
        factors = [part.factor(x) for part in self.parts]
        active = torch.cat([part.gate(drive if factor is None else drive * factor)
                            for part, drive, factor in zip(self.parts, drives, factors, strict=True)], -1)
        stream = self._run[0].stream
        stream.add(active.reshape(*stream.ids.shape, -1))
        written = _written(self.part)
        return active @ written[:-1] + written[-1]


def _read(part: nn.Module, name: str = "v_proj") -> tuple[Float[Tensor, "target d"], Float[Tensor, "target"]]:
    """Read vectors and biases of a site's targets, live. name: the projection, of an attention layer."""
    if not isinstance(part, Transcoder):
        weight = projection(part, name).weight
        return weight, or_zeros(projection(part, name).bias, weight)
    if part.skip_in is None:
        return part.w_enc, part.b_enc
    return torch.cat([part.w_enc, part.skip_in]), torch.cat([part.b_enc, part.b_enc.new_zeros(part.skip)])


def _written(part: nn.Module) -> Float[Tensor, "source d"]:
    """Write vectors of a site's nodes and of its bias, live."""
    if isinstance(part, Transcoder):
        return torch.cat([part.w_dec, *([] if part.skip_out is None else [part.skip_out]), part.b_dec[None]])
    out = projection(part, "o_proj")
    return torch.cat([out.weight.T, or_zeros(out.bias, out.weight)[None]])


class EdgeModel(nn.Module):
    """A circuit that runs edge by edge; nothing is shared with the one it was made of. routing: queries and keys are targets too.

    Raises ValueError for a class with norms after its sublayers: none of its circuits compiles, so there is nothing to be equal to.
    """

    def __init__(self, circuit: Replacement, routing: bool = False) -> None:
        super().__init__()
        if architecture(circuit.model).post is not None:
            raise ValueError(f"{type(circuit.model).__name__}: a norm scales what each sublayer writes, so an edge has no fixed weight; use --as "
                             "graph")
        own = copy.deepcopy(circuit)
        self.model, self.tokenizer, self.sites = own.model, own.tokenizer, own.sites
        self.vocabulary: int = own.model.config.vocab_size
        self._order = sorted(self.sites, key=lambda site: site.writes_at)
        self._parts: list[nn.Module] = [own.part(site) for site in self._order]
        self.stream = Stream(torch.zeros(1, 0, dtype=torch.long))
        self.readers: dict[str, Reader] = {}
        self._watch_stream()
        for site in self.sites:
            self._install(site, own.part(site), routing)
        self._install_logits()
        for table in embeddings(self.model):
            table.requires_grad_(False)

    def host(self) -> Host:
        """The run as a host, its weights fixed: generation and every judge work on it as on any model."""
        self.fix()
        return Host(self.model, self.tokenizer, self.sites)

    def forward(self, ids: Int[Tensor, "row token"]) -> Float[Tensor, "row token vocabulary"]:
        """Logits."""
        return self.model(input_ids=ids, use_cache=False).logits

    def keep(self, kept: Edges) -> EdgeModel:
        """Cut all other edges of the targets named."""
        for name, mask in kept.items():
            self.readers[name].kept.copy_(mask)
        self.thaw()
        return self

    @torch.no_grad()
    def fix(self) -> None:
        """Store every weight; a change of the circuit's weights is not seen until `thaw`."""
        self.thaw()
        for reader in self.readers.values():
            reader.fix()

    def thaw(self) -> None:
        """Compute weights anew at each pass."""
        self.stream.writes = None
        for reader in self.readers.values():
            reader.fixed = None

    def save(self, folder: Path) -> None:
        """Write what `restore` needs on the same circuit: which edges are kept, what cut ones are held at, trained weights."""
        from safetensors.torch import save_file

        held = {f"weight.{name}": weight.detach().contiguous() for name, weight in self.model.named_parameters() if weight.requires_grad}
        for name, reader in self.readers.items():
            held |= {f"kept.{name}": reader.kept, f"mean.{name}": reader.mean}
        save_file(held, folder / "edges.safetensors")

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        held, weights = load_file(folder / "edges.safetensors"), dict(self.model.named_parameters())
        for key, value in held.items():
            kind, _, name = key.partition(".")
            (weights[name] if kind == "weight" else getattr(self.readers[name], kind)).copy_(value)
        self.thaw()

    def count(self, sites: int) -> int:
        """Sources among tokens and the first `sites` sites."""
        return self.vocabulary + sum(len(_written(part)) for part in self._parts[:sites])

    def columns(self) -> dict[str, slice]:
        """Where each site's nodes and, last, its bias stand among the sources; and all tokens."""
        ends = [self.count(sites) for sites in range(len(self._order) + 1)]
        return {"token": slice(0, ends[0])} | {site.name: slice(*ends[at : at + 2]) for at, site in enumerate(self._order)}

    def writes(self) -> Float[Tensor, "source d"]:
        """Write vectors of all sources, once a pass."""
        if self.stream.writes is None:
            tokens = self.model.get_input_embeddings()(torch.arange(self.vocabulary))
            self.stream.writes = torch.cat([tokens, *(_written(part) for part in self._parts)])
        return self.stream.writes

    def _watch_stream(self) -> None:
        """Begin a stream with each pass; note what each norm divides by."""
        table: Any = self.model.get_input_embeddings()

        def begin(_module, args, kwargs):
            self.stream = Stream(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

        def scale(path: str):
            def hook(_module, args, kwargs):
                stream, ids = args[0] if args else kwargs["hidden_states"], self.stream.ids
                stream = stream.reshape(*ids.shape, -1)
                if not self.stream.inverse and architecture(self.model).positions is not None:
                    self.stream.position = stream - table(ids)
                self.stream.inverse[path] = norm(self.model, path).inverse(stream)
            return hook

        self.model.register_forward_pre_hook(begin, with_kwargs=True)
        for path in {site.norm for site in self.sites} | {architecture(self.model).final_norm}:
            module = self.model.get_submodule(path)
            module.requires_grad_(False)
            module.register_forward_pre_hook(scale(path), with_kwargs=True)

    def _reader(self, name: str, path: str, reads_at: int, reads: Callable[[], tuple[Tensor, Tensor]]) -> Reader:
        self.readers[name] = Reader(self, path, sum(site.writes_at <= reads_at for site in self._order), reads)
        return self.readers[name]

    def _install(self, site: Any, part: nn.Module, routing: bool) -> None:
        """Readers at one site."""
        if isinstance(part, Transcoder):
            install(self.model, site, _MLP(self, part, self._reader(site.name, site.norm, site.reads_at, partial(_read, part))))
            return
        assert isinstance(part, Attention)
        names = {"v_proj": site.name} | ({"q_proj": f"{site.name}.query", "k_proj": f"{site.name}.key"} if routing else {})
        for projected, name in names.items():
            reader = self._reader(name, site.norm, site.reads_at, partial(_read, part, projected))
            setattr(part, projected, _Linear(projection(part, projected), reader))
        projection(part, "o_proj").register_forward_pre_hook(lambda _module, args: self.stream.add(args[0].reshape(*self.stream.ids.shape, -1)))

    def _install_logits(self) -> None:
        """The reader of the logits."""
        head: Any = self.model.get_output_embeddings()
        common = head.weight.detach().mean(0)
        reader = self._reader(LOGITS, architecture(self.model).final_norm, 2 * self.model.config.num_hidden_layers,
                              lambda: (head.weight - head.weight.mean(0), or_zeros(head.bias, head.weight)))
        self.model.set_output_embeddings(_Linear(head, reader, common))
