"""What half the parameters buys in time, where it is not the interpreter's: a wide model, and the organism in large batches.

    python benchmarks/speed.py RUN        measures everything, writes results/speed.json (two minutes on two cores, nothing beside it)

A Llama of random weights, width 1,024 and 12 layers, is cut to half its stored parameters (embeddings apart) by this package's own road,
untrained, for speed does not depend on what weights say: its own neurons and heads (the same class), and random transcoders
(Arcee). Each is timed in turns with the whole model, so that a slow minute slows both: decoding at batch 1 (64 tokens after 16) and
prefill (512 tokens), float32. For information: the default organism and its checkpoint, decoding at batch 1 and 256.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from distill import config
from distill.budget import bought
from distill.compile import compile_circuit
from distill.models import find
from evals.generate import decode, greedy
from evals.size import parameters
from evals.statistics import ratio
from graphs.architectures import sites
from graphs.artifact import write_json
from graphs.host import Host, load
from graphs.prune import kept_nodes
from graphs.replace import from_noise

ROOT = Path(__file__).parent.parent
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 2816,
         "max_position_embeddings": 1024}
FEATURES = 4096
"""Of the random transcoders: about as many MLP parameters as the model's own."""
REPEATS = 7
PROMPT, WRITTEN, READ = 16, 64, 512


def wide(tokenizer) -> Host:
    """The random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE, **ends)).eval()
    return Host(model, tokenizer, sites(model))


def halved(host: Host, verb: config.Prune) -> Host:
    """The model cut to half its parameters and compiled."""
    whole = from_noise(host, FEATURES, 0, "kept", basis=verb.basis)
    order = {name: torch.rand(count) for name, count in whole.node_counts().items()}
    size = bought(whole, verb, parameters(host.model).stored)
    return compile_circuit(whole.pruned(kept_nodes(order, size)), verb.target)


def timed(work: Mapping[str, Callable[[], object]], each: int) -> dict[str, list[float]]:
    """Pieces of work a second, in turns; one warm-up each. each: pieces in one piece of work."""
    for one in work.values():
        one()
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(REPEATS):
        for name in list(work) if turn % 2 else list(work)[::-1]:
            start = time.perf_counter()
            work[name]()
            rates[name].append(each / (time.perf_counter() - start))
    return rates


@torch.no_grad()
def measure(hosts: dict[str, Host], batch: int, prefill: bool) -> dict:
    """Decoding (and prefill) of the first host and the others, tokens a second and as a ratio to the first, with 95 % intervals."""
    first = next(iter(hosts))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, hosts[first].config.vocab_size, (batch, READ), generator=generator)
    prompts = ids[:, :PROMPT].tolist()
    found = {"decode": timed({name: lambda host=host: decode(host, prompts, WRITTEN, greedy, None) for name, host in hosts.items()}, batch * WRITTEN)}
    if prefill:
        found["prefill"] = timed({name: lambda host=host: host.model(input_ids=ids) for name, host in hosts.items()}, batch * READ)
    return {kind: {name: {"tokens_per_second": statistics.median(rates[name]), "ratio": ratio(rates[name], rates[first]).to_json()} for name in hosts}
            for kind, rates in found.items()}


def main(run: Path) -> None:
    """Measure and write."""
    organism = load(find("builtin:organism"))
    host, verb = wide(organism.tokenizer), config.Prune(target_ratio=0.5)
    hosts = {"whole": host, "own neurons": halved(host, replace(verb, basis="neurons", target="own")), "transcoders": halved(host, verb)}
    pair = {"whole": organism, "checkpoint": load(run / "checkpoint")}
    found = {"shape": SHAPE, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
             "stored": {name: parameters(one.model).stored for name, one in hosts.items()},
             "wide, batch 1": measure(hosts, 1, True)}
    print(found["wide, batch 1"], file=sys.stderr)
    found["stored organism"] = {name: parameters(one.model).stored for name, one in pair.items()}
    for batch in (1, 256):
        found[f"organism, batch {batch}"] = measure(pair, batch, False)
    write_json(ROOT / "results" / "speed.json", found)


if __name__ == "__main__":
    from words import words

    main(Path(*words(__doc__, lambda given: len(given) == 1)))
