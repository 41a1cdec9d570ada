"""Published transcoders as the start of a fit, in the place of noise.

A published dictionary (`graphs.zoo`) was made on all kinds of text and has many more features than one task uses. Of each layer's, those are
taken that write most on clean rows: mean activation times the write vector's norm. What the others write there on average goes into the output
bias, as where nodes are pruned (mean ablation). A linear skip is cut to the rank that was asked for: the directions along which what it writes on
those rows varies most, which is the best of its rank there (Eckart and Young 1936, of the outputs); of what is cut the mean stays.

A ReLU dictionary begins as what it is. JumpReLU and TopK are no stock MLP's (`graphs.transcoder.relu_units`): their weights become a ReLU
transcoder, which the fit has to bring back, so without a fit they are refused. Layers are read one after another: all together, published
dictionaries are often larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from graphs import zoo
from graphs.activations import record
from graphs.batches import Batch
from graphs.dictionary import Dictionary, ReLU
from graphs.host import Host
from graphs.transcoder import Transcoder

BATCHES, TOKENS = 4, 64
"""Clean batches that features are chosen on, and tokens that all of a dictionary's features look at together."""


def transcoders(
    folder: Path, host: Host, batches: Callable[[int], Batch], features: int, skip: int = 0, hook: str | None = None, fitted: bool = True
) -> dict[str, Transcoder]:
    """A transcoder of `features` features and a skip of rank `skip` for every MLP site, from the dictionaries in `folder`, by site name.
    fitted: whether a fit follows.

    Raises ValueError (one sentence) as `zoo.load` does, and where a layer has none, too few features or no skip, or a gate needs a fit.
    """
    inputs, made = _inputs(host, [batches(step) for step in range(BATCHES)]), {}
    for name, found in zoo.each(folder, host, hook):
        if not fitted and not isinstance(found.parts[0].gate, ReLU):
            raise ValueError(f"--dictionaries {folder}: {name} has the gate {type(found.parts[0].gate).__name__}, which no stock MLP has: give "
                             "--fit-steps of 100 and more, which make it ReLU")
        _check(folder, name, found, features, skip)
        made[name] = chosen(found, inputs[name], features, skip)
    without = [name for name in inputs if name not in made]
    if without:
        raise ValueError(f"--dictionaries {folder}: it holds none for {without[0]}; give a folder with one for every layer")
    return made


def _inputs(host: Host, batches: Iterable[Batch]) -> dict[str, Float[Tensor, "token d_in"]]:
    """What every MLP reads on clean tokens."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in host.sites if site.kind == "mlp"}
    with torch.no_grad():
        for batch in batches:
            seen = record(host, batch.ids)
            for name, kept in found.items():
                kept.append(seen.inputs[name][batch.real])
    return {name: torch.cat(kept) for name, kept in found.items()}


def _check(folder: Path, name: str, found: Dictionary, features: int, skip: int) -> None:
    there = len(found.parts[0].read)
    if features > there:
        raise ValueError(f"--dictionaries {folder}: {name} has {there} features; give --features of at most as many")
    if skip and len(found.parts) == 1:
        raise ValueError(f"--dictionaries {folder}: {name} has no linear skip; leave --skip out")
    if skip > len(found.constant):
        raise ValueError(f"--dictionaries {folder}: {name} writes {len(found.constant)} numbers; give --skip of at most as many")


@torch.no_grad()
def chosen(dictionary: Dictionary, x: Float[Tensor, "token d_in"], features: int, rank: int) -> Transcoder:
    """The features that write most on these inputs, and the skip's best `rank` directions there, as a ReLU transcoder."""
    main, bias = dictionary.parts[0], dictionary.constant
    mean = torch.stack([main.gate(main.drive(rows)).sum(0) for rows in x.split(TOKENS)]).sum(0) / len(x)
    kept = (mean.abs() * main.write.norm(dim=1)).topk(features).indices.sort().values
    bias = bias + mean @ main.write - mean[kept] @ main.write[kept]
    weights = {"w_enc": main.read[kept], "b_enc": main.bias[kept], "w_dec": main.write[kept], "mean": mean[kept]}
    if len(dictionary.parts) > 1:
        through = dictionary.parts[1].write.T @ dictionary.parts[1].read
        written = x @ through.T
        spread = written - written.mean(0)  # the mean is the bias's
        most = torch.linalg.eigh(spread.T @ spread).eigenvectors.flip(1)[:, :rank]  # of d_out x d_out, the largest last
        bias = bias + written.mean(0) - written.mean(0) @ most @ most.T
        if rank:
            weights |= {"skip_in": most.T @ through, "skip_out": most.T}
    made = Transcoder(features, main.read.shape[1], main.write.shape[1], skip=rank)
    made.set_weights(weights | {"b_dec": bias})
    return made
