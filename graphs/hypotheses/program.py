"""The program: a circuit as one Python file that runs by itself, hypotheses as functions where they stand and equations elsewhere.

    L2_F117 = relu(k*(3.1*L1_H2_C0 - 0.54*L0_F44 - 1.2) + rest[117])                      an equation: its largest parents by name
    L2_F118 = table_L2_F118(texts) if code else relu(k*(0.8*L0_H1_C3) + rest[118])        a hypothesis, and what it stands for
    L1_H2_C0 = p[2] @ (k*(0.31*is_token(ids, ' keep')) + rest[32])                        a component, routed by its head's pattern

`k` is 1 / scale of the norm, a term's number the virtual weight of its edge (`graphs.edges`), `rest` what the line does not name. A number
in a line is one that the circuit runs on: change it and the logits change. Parents are those that carry most of the node's drive on
clean tokens. The file needs numpy only; weights, sample prompts and their logits (of the circuit, and of the circuit with every accepted
hypothesis in place, both as torch computes them) lie beside it as arrays, and running it compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.architectures import Norm, Site, architecture, attention_scores, attention_window, linear, norm, or_zeros, post_norm, rotary
from graphs.artifact import write_text
from graphs.batches import Batch
from graphs.components import Components
from graphs.dictionary import Act, Dictionary, Gated, Identity, ReLU
from graphs.edges import Reconstruction
from graphs.graph import FeatureGraph
from graphs.hypotheses import arithmetic, views
from graphs.hypotheses.hypothesis import Look, Sum
from graphs.hypotheses.source import call, comment, copied, definition, identifier, lines, token
from graphs.hypotheses.substitution import head, in_place, place, run
from graphs.hypotheses.verdict import Judged
from graphs.hypotheses.views import Text

NAME = "circuit"
"""Of the file, and of its weights."""
DIGITS = 3
"""Of a term's number; what rounding takes off stays in the rest."""
CONSTANT = 0
"""Row of ones among what is known: the output biases of all sites before, which a line sums to one number."""
ACTIVATIONS = {"relu": "relu", "relu2": "relu_squared", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh"}
"""Functions of `graphs.hypotheses.arithmetic` by the library's names."""
ABOUT = """
To check it: python circuit.py. It needs numpy; weights, sample prompts and their logits lie beside it in circuit.npz.

    L2_F117 = relu(k*(3.1*L1_H2_C0 - 0.54*L0_F44 - 1.2) + rest[117])  # 31% of its drive; active 4.0%

k is 1 / scale of the norm that a node reads through, rest what its line does not name, p where each head looks. The terms of a line are the
parents that carry most of the node's drive on clean tokens, and what earlier sites always write (-1.2); the comment says what share of the
drive these are. In "... if code else ..." a hypothesis stands before the equation that it stands for: circuit(ids, code=False) is the circuit
without hypotheses.
"""


@dataclass(frozen=True)
class Program:
    """source: the file; arrays: what lies beside it."""

    source: str
    arrays: dict[str, np.ndarray]

    def save(self, folder: Path) -> Path:
        """Write both; returns the file."""
        np.savez(folder / f"{NAME}.npz", allow_pickle=False, **self.arrays)  # type: ignore[arg-type]
        write_text(folder / f"{NAME}.py", self.source)
        return folder / f"{NAME}.py"


@torch.no_grad()
def program(
    circuit: Reconstruction, graph: FeatureGraph, tested: Sequence[Judged], samples: Sequence[Int[Tensor, "_token"]], most: int, title: str
) -> Program:
    """The circuit with its accepted hypotheses. circuit: without errors; graph: its own; samples: prompts that the file checks itself on;
    most: parents that a line names; title: what the file says it is.

    Raises ValueError where nodes are read inside another model, where a norm scales what a site writes, where positions turn by angles that
    depend on the prompt's length, and where an MLP has an activation that is not among `ACTIVATIONS`.
    """
    writer = _Writer(circuit, graph, [one for one in tested if one.evidence.accepted], most)
    for at, ids in enumerate(samples):
        writer.sample(f"sample.{at}", ids)
    return Program(writer.source(title), writer.arrays)


class _Writer:
    """One program in the making. owner: which hypothesis computes a node (site, number), with its column where it computes a whole head."""

    def __init__(self, subject: Reconstruction, graph: FeatureGraph, accepted: list[Judged], most: int) -> None:
        model = subject.host.model
        if subject.stand_ins:
            raise ValueError("only a circuit runs by itself: a fitted graph is read inside the model, whose errors no program has: "
                             "give a circuit")
        if any(post_norm(model, site) is not None for site in subject.host.sites):
            raise ValueError(f"{type(model).__name__} is not written as a program: a norm scales what each of its sublayers writes; use a "
                             "model of another class")
        self.subject, self.graph, self.nodes, self.accepted, self.most = subject, graph, graph.index, accepted, most
        self.order = sorted(self.subject.host.sites, key=lambda site: site.writes_at)
        self.arrays: dict[str, np.ndarray] = {}
        counts = accumulate((subject.basis[site.name].count for site in self.order), initial=1)  # the first known row is ones
        self.rows = dict(zip((site.name for site in self.order), counts, strict=False))
        self.owner: dict[tuple[str, int], tuple[Judged, int | None]] = {}
        self.looks: dict[tuple[str, int], Judged] = {}
        for one in sorted(accepted, key=lambda one: isinstance(one.hypothesis.rule, Sum)):  # as a run does: equations last
            site, numbers = place(self.nodes, one.hypothesis.target)
            if isinstance(one.hypothesis.rule, Look):
                self.looks[site, head(one.hypothesis.target)] = one
                continue
            whole = ".H" in one.hypothesis.target and ".C" not in one.hypothesis.target
            self.owner |= {(site, node): (one, column if whole else None) for column, node in enumerate(numbers.tolist())}

    def source(self, title: str) -> str:
        """The whole file; notes all weights."""
        count = sum(part.count for part in self.subject.basis.values())
        about = (f"{title}: {count:,} nodes, {len(self.owner):,} of them computed by hypotheses, and {len(self.looks)} patterns; the others by "
                 "equations.")
        shown = "\n\n\n".join([*(definition(one, self.nodes) for one in self.accepted), "\n".join(self._circuit())])
        last = f'load(Path(__file__).with_suffix(".npz"))\n\nif __name__ == "__main__":\n    sys.exit(verify(circuit, {len(self.accepted)}))'
        imports, library = copied([views, arithmetic], f"{shown}\n{last}")
        return "\n".join(['"""', *(line[2:] for line in comment(about)), ABOUT + '"""', "", imports, "", "", shown, "", "",
                          "# ---- what the lines above are made of", library, "", "", last, ""])

    def sample(self, name: str, ids: Int[Tensor, "token"]) -> None:
        """One prompt, its logits in the circuit and with every hypothesis in place."""
        real = torch.ones(1, len(ids), dtype=torch.bool)
        text = Text.of(Batch(ids[None], real, real), self.nodes.tokens)
        self.arrays |= {f"{name}.ids": ids.numpy(), f"{name}.circuit": self.subject.host.model(input_ids=ids[None]).logits[0].numpy()}
        if self.accepted:
            change = in_place(self.nodes, self.subject, text, [one.hypothesis for one in self.accepted])
            self.arrays[f"{name}.substituted"] = run(self.subject, ids[None], change)[0].numpy()

    def _circuit(self) -> Iterator[str]:
        """The function that runs all sites."""
        host, table = self.subject.host, self.subject.host.model.get_input_embeddings()
        self.arrays |= {"embedding": _array(_table(table)), "vocabulary": np.frombuffer(json.dumps(self.nodes.tokens).encode(), dtype=np.uint8)}
        yield "def circuit(ids, code=True):"
        yield '    """Logits "token vocabulary" of one prompt, given as its token ids. code: hypotheses in the place of what they are about."""'
        yield "    ids = np.asarray(ids)"
        yield "    texts = [VOCABULARY[one] for one in ids]"
        yield "    known = np.ones((1, len(ids)))"
        if count := self.nodes.by_name["position"].count:
            self.arrays["positions"] = _array(_table(host.module(architecture(host.model).positions or ""))[-count:])
            yield '    stream0 = W["embedding"][ids] + W["positions"][: len(ids)]'
        else:
            yield '    stream0 = W["embedding"][ids]'
        for site in self.order:
            yield from self._site(site)
        yield from self._logits()

    def _site(self, site: Site) -> Iterator[str]:
        """All nodes of one site, and what they write."""
        part, name = self.subject.basis[site.name], site.name
        kind = f"{len(part.write)} heads of {part.write.shape[1]} components" if isinstance(part, Components) else f"{part.count} features"
        yield ""
        yield f"    # ---- {name}: {kind}"
        yield from self._reading(name, norm(self.subject.host.model, site.norm), part.reads, part.biases, site.reads_at)
        yield from self._patterns(site, part) if isinstance(part, Components) else self._gates(name, part)
        whole = {one.hypothesis.target: one for (where, _), (one, column) in self.owner.items() if where == name and column is not None}
        yield from (f"    {identifier(target)} = {call(one, self.nodes)}.T if code else None" for target, one in whole.items())
        names = []
        for node in range(part.count):
            names.append(identifier(self.nodes.name(self.nodes.by_name[name].start + node)))
            yield f"    {names[-1]} = {self._value(name, part, node)}"
        self.arrays |= {f"{name}.write": _array(part.writes), f"{name}.constant": _array(part.constant)}
        yield f'    stream{site.writes_at}, known = written("{name}", stream{site.writes_at - 1}, known, ['
        yield from lines(names, 8)
        yield "    ])"

    def _reading(self, name: str, through: Norm, reads: Float[Tensor, "node d"], biases: Float[Tensor, "node"], depth: int) -> Iterator[str]:
        """What all nodes of a site read."""
        self.arrays |= {f"{name}.gain": _array(through.gain), f"{name}.offset": _array(through.offset), f"{name}.read": _array(reads),
                        f"{name}.bias": _array(biases), f"{name}.parents": np.zeros((len(reads), self.most + 1), dtype=int),
                        f"{name}.terms": np.zeros((len(reads), self.most + 1))}
        yield f'    k, x = norm("{name}", stream{depth}, eps={through.eps}, centred={through.centred})'
        yield f'    rest = remainder("{name}", k, x, ids, known)'

    def _patterns(self, site: Site, part: Components) -> Iterator[str]:
        """Where the heads of a layer look."""
        model, name = self.subject.host.model, site.name
        said = attention_scores(model, self.subject.host.module(site.module))
        takes = [f"scale={said.scale}"]
        if (window := attention_window(model, site.layer)) is not None:
            takes.append(f"window={window}")
        if said.rotates and (turning := rotary(model)) is not None:
            self.arrays["frequencies"] = _array(turning[0])
            takes.append(f"turns={turning[1]}")
        sides = (("query", said.query, said.query_bias, said.query_norm), ("key", said.key, said.key_bias, said.key_norm))
        for side, read, bias, through in sides:
            self.arrays |= {f"{name}.{side}": _array(read), f"{name}.{side}_bias": _array(or_zeros(bias, read))}
            if through is not None:
                self.arrays |= {f"{name}.{side}_norm.gain": _array(through.gain), f"{name}.{side}_norm.offset": _array(through.offset)}
        if said.query_norm is not None:
            takes.append(f"eps={said.query_norm.eps}")
        yield f'    p = patterns("{name}", x, {", ".join(takes)})'
        looks = [(at, one) for (where, at), one in self.looks.items() if where == name]
        if looks:
            yield "    if code:"
            yield from (f"        p[{at}] = {call(one, self.nodes)}" for at, one in sorted(looks, key=lambda pair: pair[0]))

    def _gates(self, name: str, part: Dictionary) -> Iterator[str]:
        """The gates of gated neurons."""
        for one in part.parts:
            if isinstance(one.gate, Gated):
                self.arrays |= {f"{name}.gate": _array(one.gate.read), f"{name}.gate_bias": _array(one.gate.bias)}
                yield f'    m = {_activation(one.gate.activation)}(W["{name}.gate"] @ x.T + W["{name}.gate_bias"][:, None])'

    def _value(self, name: str, part: Dictionary | Components, node: int) -> str:
        """A node's activation: what a hypothesis says, and its equation; how much of the drive that names."""
        number = self.nodes.by_name[name].start + node
        drive, share = self._drive(name, node, number)
        value = f"p[{node // part.write.shape[1]}] @ ({drive})" if isinstance(part, Components) else _gated(part, node, drive)
        if (name, node) in self.owner:
            one, column = self.owner[name, node]
            value = f"{call(one, self.nodes) if column is None else f'{identifier(one.hypothesis.target)}[{column}]'} if code else {value}"
        active = float(self.graph.active[number])
        return f"{value}  # " + (f"{share:.0%} of its drive; active {active:.1%}" if active else "never active on the clean tokens")

    def _drive(self, name: str, node: int, number: int) -> tuple[str, float]:
        """A node's drive with the parents that carry most of it by name, and the share that these carry; notes the terms."""
        edges, constant, share = self.graph.into(number), 0.0, 0.0
        terms: list[tuple[int, float, str]] = []
        for edge in range(edges.start, edges.stop):
            at, parent = self._parent(int(self.graph.src[edge]))
            weight = float(f"{float(self.graph.weight[edge]):.{DIGITS}g}")
            if at == CONSTANT:
                constant += weight
            elif parent and weight and len(terms) < self.most:
                terms.append((at, weight, f"*{parent}"))
            else:
                continue
            share += float(self.graph.share[edge])
        if constant := float(f"{constant:.{DIGITS}g}"):
            terms.append((CONSTANT, constant, ""))
        for column, (at, weight, _) in enumerate(terms):
            self.arrays[f"{name}.parents"][node, column], self.arrays[f"{name}.terms"][node, column] = at, weight
        said = " ".join(f"{'-' if weight < 0 else '+'} {abs(weight):g}{parent}" for _, weight, parent in terms).removeprefix("+ ")
        said = "-" + said[2:] if said.startswith("- ") else said
        return (f"k*({said}) + rest[{node}]" if terms else f"rest[{node}]"), share

    def _parent(self, number: int) -> tuple[int, str]:
        """What `arithmetic.remainder` calls a source, and how a line names it (""; an error, which a circuit has not)."""
        block = self.nodes.block(number)
        where = number - block.start
        match block.kind:
            case "token":
                return -1 - where, token(self.nodes, where)
            case "position":
                return -1 - len(self.nodes.tokens) - where, f"is_place(ids, {where})"
            case "bias":
                return CONSTANT, ""
            case "feature" | "attention":
                return self.rows[block.name] + where, identifier(self.nodes.name(number))
        return CONSTANT - 1, ""

    def _logits(self) -> Iterator[str]:
        """The last lines: what says which token comes next."""
        host, block = self.subject.host, self.nodes.by_name["logit"]
        table = host.model.get_output_embeddings()
        weight, bias = linear(table)
        yield ""
        yield "    # ---- logits: a term's number is against the mean of all logits"
        yield from self._reading("logits", norm(host.model, architecture(host.model).final_norm), weight, or_zeros(bias, weight), block.depth)
        for token_id in range(block.count):
            drive, share = self._drive("logits", token_id, block.start + token_id)
            if share:
                added = drive.removesuffix(f" + rest[{token_id}]")
                yield f"    rest[{token_id}] += {added}  # {self.nodes.tokens[token_id]!r}: {share:.0%} of its drive"
        yield "    return rest.T"


def _array(value: Float[Tensor, "*axes"]) -> np.ndarray:
    return value.detach().contiguous().numpy()


def _table(embedding: nn.Module) -> Float[Tensor, "entry d"]:
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return weight


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name} is not written as a program; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gated(part: Dictionary, node: int, drive: str) -> str:
    """The activation of a node with this drive."""
    at = node
    for one in part.parts:
        if at < len(one.read):
            match one.gate:
                case ReLU():
                    return f"relu({drive})"
                case Identity():
                    return drive
                case Act(name):
                    return f"{_activation(name)}({drive})"
                case Gated():
                    return f"m[{at}] * ({drive})"
            raise ValueError(f"a gate of the kind {type(one.gate).__name__} is not written as a program: refit with ReLU (distill fit)")
        at -= len(one.read)
    raise IndexError(node)
