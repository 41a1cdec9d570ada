"""Arithmetic: what a circuit is made of once it stands alone, in numpy and in double precision.

A circuit that is written as a program (`graphs.hypotheses.program`) holds copies of the functions here that it uses, so it needs neither
this package nor torch. In them a sequence is one prompt, the stream is "token d", and a node is a row over tokens:

    k, x = norm(...)         1 / scale of the norm at each token, and what its readers read
    rest = remainder(...)    every reader's drive without the terms that its line of the program says by name

A line then adds those terms again, so a number in a line is a number that the circuit runs on, and what no line says is in `rest`. Terms are
rounded to be read; what rounding takes off stays in `rest` too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from math import erf
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

W: dict[str, np.ndarray] = {}
"""A program's weights by name."""
VOCABULARY: list[str] = []
"""The text of each token id."""


def load(file: Path) -> None:
    """Read the weights that lie beside a program."""
    with np.load(file, allow_pickle=False) as held:
        W.update({name: held[name].astype(float) if held[name].dtype.kind == "f" else held[name] for name in held})
    VOCABULARY[:] = json.loads(W.pop("vocabulary").tobytes())


def relu(drive: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Positive part."""
    return np.maximum(drive, 0)


def relu_squared(drive: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Its square."""
    return np.maximum(drive, 0) ** 2


def silu(drive: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """x sigmoid(x)."""
    return drive / (1 + np.exp(-drive))


def gelu(drive: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """x Phi(x)."""
    return drive * 0.5 * (1 + np.vectorize(erf)(drive / 2**0.5))


def gelu_tanh(drive: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Its approximation by tanh."""
    return 0.5 * drive * (1 + np.tanh((2 / np.pi) ** 0.5 * (drive + 0.044715 * drive**3)))


def softmax(score: Float[np.ndarray, "*batch source"]) -> Float[np.ndarray, "*batch source"]:
    """Over the last axis."""
    raised = np.exp(score - score.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def norm(
    name: str, stream: Float[np.ndarray, "*batch token d"], eps: float, centred: bool = False
) -> tuple[Float[np.ndarray, "*batch token"], Float[np.ndarray, "*batch token d"]]:
    """1 / scale at each token and what the norm puts out. centred: a LayerNorm, else an RMSNorm."""
    inner = stream - stream.mean(-1, keepdims=True) if centred else stream
    k = 1 / np.sqrt((inner**2).mean(-1) + eps)
    return k, W[f"{name}.gain"] * inner * k[..., None] + W[f"{name}.offset"]


def is_token(ids: Int[np.ndarray, "token"], which: str | int) -> Float[np.ndarray, "token"]:
    """1 where a token stands, else 0. which: its text or its id."""
    return (ids == (VOCABULARY.index(which) if isinstance(which, str) else which)).astype(float)


def is_place(ids: Int[np.ndarray, "token"], which: int) -> Float[np.ndarray, "token"]:
    """1 at one place of the prompt, else 0."""
    return (np.arange(len(ids)) == which).astype(float)


def remainder(
    name: str, k: Float[np.ndarray, "token"], x: Float[np.ndarray, "token d"], ids: Int[np.ndarray, "token"],
    known: Float[np.ndarray, "source token"],
) -> Float[np.ndarray, "target token"]:
    """Drives without what the lines say. known: a row of ones (what constants write) and every node so far; of a term's parent, numbers from
    0 on are rows of it, the next below are tokens, those below them places."""
    parents = W[f"{name}.parents"]
    tokens, places = -1 - parents, -1 - parents - len(VOCABULARY)
    outer = (ids == tokens[..., None]) | (np.arange(len(ids)) == places[..., None])
    active = np.where((parents >= 0)[..., None], known[np.maximum(parents, 0)], outer)
    said = (W[f"{name}.terms"][..., None] * active).sum(1)
    return W[f"{name}.read"] @ x.T + W[f"{name}.bias"][:, None] - k * said


def patterns(
    name: str, x: Float[np.ndarray, "token d"], scale: float, window: int | None = None, turns: float | None = None, eps: float = 0.0
) -> Float[np.ndarray, "head token source"]:
    """Where every head looks. window: tokens that it looks back on, itself among them; turns: what rotary positions are multiplied with, None
    where there are none; eps: of norms of queries and keys, where there are any."""
    query, key = (np.einsum("td,hid->hti", x, W[f"{name}.{side}"]) + W[f"{name}.{side}_bias"][:, None] for side in ("query", "key"))
    if f"{name}.query_norm.gain" in W:
        query, key = norm(f"{name}.query_norm", query, eps)[1], norm(f"{name}.key_norm", key, eps)[1]
    if turns is not None:
        query, key = turned(query, turns), turned(key, turns)
    score = scale * query @ key.repeat(len(query) // len(key), 0).transpose(0, 2, 1)
    back = np.arange(len(x))[:, None] - np.arange(len(x))
    return softmax(np.where((back >= 0) & (back < (window or len(x))), score, -np.inf))


def turned(side: Float[np.ndarray, "head token inside"], turns: float) -> Float[np.ndarray, "head token inside"]:
    """Queries or keys turned by their places, in the first dimensions as far as the frequencies go (Su et al. 2021)."""
    angle = np.arange(side.shape[1])[:, None] * W["frequencies"]
    cos, sin, half = np.cos(angle) * turns, np.sin(angle) * turns, angle.shape[1]
    one, other, rest = side[..., :half], side[..., half : 2 * half], side[..., 2 * half :]
    return np.concatenate([one * cos - other * sin, other * cos + one * sin, rest], -1)


def written(
    name: str, stream: Float[np.ndarray, "token d"], known: Float[np.ndarray, "source token"], nodes: Sequence[Float[np.ndarray, "token"]]
) -> tuple[Float[np.ndarray, "token d"], Float[np.ndarray, "source token"]]:
    """The stream behind a site, and all nodes that are known by then."""
    active = np.stack(nodes)
    return stream + active.T @ W[f"{name}.write"] + W[f"{name}.constant"], np.concatenate([known, active])


def first_known(texts: Sequence[str], *tables: tuple, otherwise: float | tuple[float, ...]) -> Float[np.ndarray, "token *value"]:
    """What the first table that knows a token's key says of it. tables: a view and the worth of its keys."""
    keys = [says(texts) for says, _ in tables]
    said = [[table[key[at]] for key, (_, table) in zip(keys, tables, strict=True) if key[at] in table] for at in range(len(texts))]
    return np.array([one[0] if one else otherwise for one in said], dtype=float)


def looking(
    texts: Sequence[str], relations: Mapping[Callable, float], distance: Sequence[float] = (), asks: Callable | None = None,
    answers: Callable | None = None, pairs: Mapping[str, float] | None = None,
) -> Float[np.ndarray, "token source"]:
    """A head's pattern as code says it: softmax of the weights of the relations that hold, of the distance (the last for all farther), and of
    the pair of keys, a tab between them. asks, answers: views of the token that looks and of the one looked at (None: one key for all)."""
    back = np.arange(len(texts))[:, None] - np.arange(len(texts))
    score = np.zeros(back.shape)
    for holds, weight in relations.items():
        score = score + weight * holds(texts)
    if len(distance):
        score = score + np.array(distance)[back.clip(0, len(distance) - 1)]
    if pairs:
        asking, answering = (says(texts) if says else [""] * len(texts) for says in (asks, answers))
        score = score + np.array([[pairs.get(f"{one}\t{other}", 0.0) for other in answering] for one in asking])
    return softmax(np.where(back >= 0, score, -np.inf))


def verify(circuit: Callable[..., Float[np.ndarray, "token vocabulary"]], coded: int) -> int:
    """Run a program on its sample prompts and print how far it is from the logits that lie beside it; 1 where it is not them. coded: how many
    hypotheses it holds. With --json as the first argument it prints JSON."""
    found: list[dict] = []
    places, agree, kl, bound = 0, 0, 0.0, 1e-4
    while f"sample.{len(found)}.ids" in W:
        sample = f"sample.{len(found)}"
        ids, own = W[f"{sample}.ids"], W[f"{sample}.circuit"]
        exact, said = circuit(ids, False), circuit(ids) if coded else own
        bound = max(bound, 1e-5 * float(np.abs(own).max()))
        p, q = softmax(own), softmax(said)
        kl, places = kl + float((p * np.log(np.maximum(p, 1e-30) / np.maximum(q, 1e-30))).sum()), places + len(ids)
        agree += int((own.argmax(-1) == said.argmax(-1)).sum())
        found.append({"text": "".join(VOCABULARY[one] for one in ids), "circuit": float(np.abs(exact - own).max()),
                      "hypotheses": float(np.abs(said - W[f"{sample}.substituted"]).max()) if coded else None})
    worst = [float(np.max([one[name] for one in found])) for name in ("circuit", "hypotheses") if coded or name == "circuit"]  # nan stays nan
    passed = all(one <= bound for one in worst)
    if sys.argv[1:2] == ["--json"]:
        print(json.dumps({"passed": passed, "bound": bound, "samples": found, "tokens": places, "kl": kl / places, "agree": agree / places}))
        return 0 if passed else 1
    for one in found:
        print(f"{one['text'][:60]!r}: {one['circuit']:.1e}" + (f", with hypotheses {one['hypotheses']:.1e}" if coded else ""))
    print(f"{'pass' if passed else 'FAIL'}: logits are the circuit's to {worst[0]:.1e}"
          + (f", with {coded} hypotheses in place those of the substituted run to {worst[1]:.1e}" if coded else "")
          + f" (at most {bound:.1e}; {len(found)} prompts, {places} tokens)")
    if coded:
        print(f"with them, beside the circuit: KL {kl / places:.3f} nats a token, the same first choice at {agree / places:.1%} of tokens")
    return 0 if passed else 1
