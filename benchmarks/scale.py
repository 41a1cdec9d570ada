"""What the road costs at other sizes: constants measured on this machine, and a plan on paper for models that were never run here.

    python benchmarks/scale.py measure     fits a Llama of random weights for a few steps, writes results/scale.json
    python benchmarks/scale.py write       writes the plan into docs/scale.md from that file; a test checks that it is current

Floating-point operations are counted by formula (a test holds it against torch's counter on real steps). Measured is which share of the
machine's own matrix-product rate the steps reach, both in processor time of one thread, by turns; and how many bytes a step keeps for its
backward pass. A plan carries the share over to a GPU's published rate, which is an assumption and not a measurement.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.experiment.tables import table
from distill.models import find
from graphs.architectures import sites
from graphs.batches import Batch, Encoded, Epochs
from graphs.fit import FitConfig, distill, local_loss, local_rate, watching
from graphs.host import Host, load
from graphs.losses import PROMPT_WEIGHT, divergence
from graphs.prune import PruneConfig, learn_gates
from graphs.replace import from_noise
from graphs.shares import share
from graphs.targets import Targets
from graphs.train import TrainConfig, train

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "results" / "scale.json", ROOT / "docs" / "scale.md"
STEPS = 4
"""Steps that a time is the mean of."""
TURNS = 7
"""Times, each between two measurements of the machine's rate; the median share counts, for a machine that others use changes its speed."""
SPLIT = {"fit: local": 400 * 24, "fit: end to end": 100 * 24, "gates": 80 * 24}
"""Rows of each stage in the default command; healing takes the rest of its tokens."""
PEAK, HELD = 989e12, 80e9
"""An H100 SXM by its data sheet: dense bf16 operations a second, bytes of memory."""
BATCH = 1024
"""Tokens of a batch on each GPU."""


@dataclass(frozen=True)
class Shape:
    """A Llama. hidden: of the MLP; keys: KV heads."""

    name: str
    width: int
    layers: int
    heads: int
    keys: int
    hidden: int
    vocabulary: int

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return 2 * self.width * self.width + 2 * self.width * self.width * self.keys // self.heads

    @property
    def body(self) -> int:
        """Weights of all layers, embeddings apart."""
        return self.layers * (self.attention + 3 * self.width * self.hidden)

    def parts(self, features: int) -> int:
        """Weights that stand for the layers and are trained."""
        return self.layers * (self.attention + 2 * self.width * features)


SMALL = Shape("measured", 512, 4, 8, 8, 1536, 1024)
BIG = (Shape("8B", 4096, 32, 32, 8, 14336, 128256), Shape("70B", 8192, 80, 64, 8, 28672, 128256))


def operations(shape: Shape, features: int, stage: str, known: bool = False) -> float:
    """Floating-point operations a token in matrix products with weights (attention's own products, small for short rows, apart).

    known: the model's logits are kept (`graphs.targets`). Local: the model up to its last layer; of each part the forward pass, the weights'
    gradients, and the gradients of what is inside it, for its input has none. End to end: besides, all parts swapped in, forward and backward.
    """
    head = shape.width * shape.vocabulary
    logits = 0.0 if known else 2.0 * (shape.body + head)
    swapped = 6.0 * shape.parts(features) + 4.0 * head
    inside = shape.layers * (10.0 * shape.width * features + 4.0 * shape.attention + 2.0 * shape.width * shape.width)
    local = 2.0 * shape.body + inside
    return {"fit: local": local, "fit: end to end": logits + swapped + local, "gates": logits + swapped, "heal": logits + swapped}[stage]


def activations(shape: Shape, features: int) -> float:
    """Bytes a token that a step end to end keeps for its backward pass, by the rule of `distill prune --dry-run`."""
    return 4.0 * (4 * shape.vocabulary + shape.layers * (12 * shape.width + 3 * features))


# ------------------------------------------------------------------------------------------------------ measuring


def prepared(shape: Shape, rows: int, length: int) -> Targets:
    """A host of random weights, and rows of random tokens."""
    torch.manual_seed(0)
    tokenizer = load(find("builtin:base")).tokenizer
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.keys, max_position_embeddings=length, tie_word_embeddings=True)).eval()
    ids = torch.randint(2, shape.vocabulary, (rows, length)).tolist()
    data = Epochs([Encoded(tuple(row), length // 2) for row in ids], rows, tokenizer.eos_token_id, 0)
    return Targets(Host(model, tokenizer, sites(model)), data)


def stages(targets: Targets, features: int) -> dict[str, Callable[[int], object]]:
    """Each stage's training, as something that takes a number of steps. Rebirth, three times in a fit, is left out."""
    host, batches, config = targets.host, targets.batches, FitConfig(features=features)
    whole, spread = from_noise(host, features, 0), {site.name: 1.0 for site in host.sites}

    def local(batch: Batch) -> torch.Tensor:
        return local_loss(host, whole, batch, config, spread)

    def fitted(steps: int) -> None:
        with watching(whole):
            train(whole, lambda step: local(share(batches(step))), TrainConfig(steps, local_rate(config, host.config.hidden_size)), "fit: local")

    def joined(steps: int) -> None:
        with watching(whole):
            distill(targets, whole, steps, config.joint_rate, config.prompt_weight, "fit: end to end",
                    beside=lambda batch: config.anchor * local(batch))

    def gated(steps: int) -> None:
        learn_gates(targets, whole, PruneConfig(score="magnitude", steps=steps))

    return {"fit: local": fitted, "fit: end to end": joined, "gates": gated}


def spent(work: Callable[[], object]) -> float:
    """Processor seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def matrix_rate(size: int) -> float:
    """Operations a processor second in a float32 product of this machine."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(spent(lambda: a @ b) for _ in range(3))


def kept(targets: Targets, features: int) -> int:
    """Bytes that a step end to end keeps for its backward pass, whatever is a weight apart."""
    replacement = from_noise(targets.host, features, 0)
    batch, known = targets.batches(0), {p.untyped_storage().data_ptr() for p in replacement.parameters()}
    found: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        where = value.untyped_storage()
        if where.data_ptr() not in known:
            found[where.data_ptr()] = where.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = divergence(replacement(batch.ids), targets(batch), batch, PROMPT_WEIGHT)
        with watching(replacement):
            spread = {site.name: 1.0 for site in targets.host.sites}
            loss = loss + local_loss(targets.host, replacement, batch, FitConfig(features=features), spread)
    return sum(found.values())


def measure() -> dict:
    """The constants."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # steps and products in one precision, on any machine
    features, rows, length = 2048, 8, 128
    targets, tokens = prepared(SMALL, rows, length), rows * length
    targets(targets.batches(0))  # the logits are known from here on
    shares: dict[str, dict[str, float]] = {}
    for name, run in stages(targets, features).items():
        rates, speeds, done = [matrix_rate(1024)], [], operations(SMALL, features, name, known=True) * tokens * STEPS
        for _ in range(TURNS):
            speeds.append(done / (-spent(lambda run=run: run(1)) + spent(lambda run=run: run(1 + STEPS))))
            rates.append(matrix_rate(1024))
        share = statistics.median(2 * speed / (before + after) for speed, before, after in zip(speeds, rates[:-1], rates[1:], strict=True))
        shares[name] = {"share": share, "operations_a_second": statistics.median(speeds), "matrix_rate": statistics.median(rates)}
    return {"shape": asdict(SMALL), "features": features, "batch_tokens": tokens, "steps": STEPS, "threads": 1, "torch": torch.__version__,
            "stages": shares, "kept_over_rule": kept(targets, features) / (activations(SMALL, features) * tokens)}


# ------------------------------------------------------------------------------------------------------ the plan


def default_run() -> dict:
    """What the default command trained on, and how many weights it trained (results/summaries.jsonl)."""
    rows = [json.loads(line) for line in (ROOT / "results" / "summaries.jsonl").read_text().splitlines()]
    return next(row["summary"] for row in rows if row["name"] == "default")


def ratio() -> float:
    """Tokens that the default command trains on, for each weight that it trains."""
    return default_run()["tokens"] / Shape("builtin", 144, 4, 9, 9, 432, 1024).parts(512)


def divided(tokens: float) -> dict[str, float]:
    """Tokens of each stage, in the default command's proportions."""
    whole = default_run()
    each = whole["tokens"] / whole["steps"] / 24  # tokens a row
    shares = {name: rows * each / whole["tokens"] for name, rows in SPLIT.items()}
    return {name: share * tokens for name, share in (shares | {"heal": 1 - sum(shares.values())}).items()}


def plan(shape: Shape, features: int, gpus: int, tokens: float, constants: dict) -> dict[str, float]:
    """Hours by stage; bytes on each GPU, with all trained weights whole in a step (as FSDP2 is used here) and one layer's at a time; bytes on disk.

    Healing is counted at the whole graph's size, and evaluation not at all.
    """
    share = {name: one["share"] for name, one in constants["stages"].items()}
    share["heal"] = share["gates"]
    hours = {name: count * operations(shape, features, name) / (gpus * PEAK * share[name]) / 3600 for name, count in divided(tokens).items()}
    trained, table_ = shape.parts(features), 2 * shape.width * shape.vocabulary
    kept_ = activations(shape, features) * constants["kept_over_rule"] * BATCH
    model, shards = 2 * (shape.body + table_), 16 * trained / gpus
    return hours | {"all": sum(hours.values()), "one unit": model + 4 * trained + shards + kept_,
                    "layers": model / gpus + shards + (4 * trained + 2 * shape.body) / shape.layers + kept_, "disk": 28 * trained + 4 * table_}


def block() -> str:
    """The plan as Markdown."""
    constants, rows = json.loads(RESULTS.read_text()), []
    for shape, gpus, features in ((BIG[0], 8, 16384), (BIG[0], 8, 131072), (BIG[1], 8, 32768), (BIG[1], 64, 32768)):
        for tokens in (1e9, ratio() * shape.parts(features)):
            made = plan(shape, features, gpus, tokens, constants)
            fits = {key: f"{made[key] / 1e9:,.0f} ({'fits' if made[key] <= HELD else 'does not fit'})" for key in ("one unit", "layers")}
            rows.append([shape.name, str(gpus), f"{features:,}", f"{shape.parts(features) / 1e9:.1f}B", f"{tokens / 1e9:,.0f}B",
                         f"{made['all']:,.0f}", fits["one unit"], fits["layers"], f"{made['disk'] / 1e12:.1f}"])
    shares = ", ".join(f"{name} {one['share']:.0%}" for name, one in constants["stages"].items())
    header = ["model", "GPUs", "features a layer", "trained", "tokens", "hours", "GB a GPU, one unit", "GB a GPU, by layers", "TB on disk"]
    return "\n".join([
        table(header, rows), "",
        f"Share of the machine's own matrix-product rate, measured in float32 on one thread at width {constants['shape']['width']}, with",
        f"{constants['features']:,} features and {constants['batch_tokens']:,} tokens a batch, torch {constants['torch']}: {shares}. A step keeps",
        f"{constants['kept_over_rule']:.2f} times the bytes of the rule of `--dry-run`. Assumed: the same shares of {PEAK / 1e12:.0f} TFLOP/s,",
        f"{BATCH:,} tokens on each GPU at a time, no time for communication. 1B tokens, or {ratio():.1f} a trained weight, as in the default",
        "command."])


def write() -> str:
    """docs/scale.md with the plan brought up to date."""
    text, begin, end = PAGE.read_text(), "<!-- plan: begin -->", "<!-- plan: end -->"
    return text[: text.index(begin) + len(begin)] + "\n" + block() + "\n" + text[text.index(end) :]


if __name__ == "__main__":
    from words import words

    match words(__doc__, lambda given: given in (["measure"], ["write"])):
        case ["measure"]:
            RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
        case ["write"]:
            PAGE.write_text(write())
