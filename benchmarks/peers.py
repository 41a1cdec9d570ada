"""Our fit and our prompt graphs against the libraries that others would use, in ratios of one run.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 eai-sparsify==1.3.3 circuit-tracer==0.5.0
    python benchmarks/peers.py fit PEERS      sae_lens' SAETrainer (this environment's), sparsify's Trainer (PEERS)
    python benchmarks/peers.py memory PEERS   the most memory that each of these holds while it trains
    python benchmarks/peers.py trace PEERS    circuit-tracer's attribute (PEERS)

Each writes its part of results/peers.json. Each side is a process of its own, with one thread, that runs its library's public trainer (or
attribution) on the same stored inputs (`peers_fit.py`, `peers_trace.py`). They take turns, a few steps each, in an order that reverses every
time, and sleep between, so that a slow minute of the machine slows all; the first turn is left out. Times are processor seconds.

What is fitted: the MLPs of a Llama of random weights on Zipf-distributed tokens, what each reads and writes stored once. Ours is the
local step of `distill fit` (ReLU, tanh penalty), sae_lens its ReLU and L1, sparsify its TopK, for it has no ReLU. The machine's
matrix-product rate is measured in the same turns at the same shapes: the five products of a step (forward two, backward three).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill.models import find
from evals.statistics import ratio
from graphs.activations import record
from graphs.architectures import sites
from graphs.artifact import write_json
from graphs.host import Host, load

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "peers.json"
VOCABULARY, HELD, BATCHES = 1024, 2048, 24
RATE = 4e-3 * 128
"""Learning rate times width of the two trainers that use Adam: our default at the width of our models, falling as 1 / width. sae_lens' own
(3e-4) is meant for a hundred times as many steps; sparsify chooses its own by the number of features."""


@dataclass(frozen=True)
class Job:
    """One side of one race. precision: "no" (float32) or "bf16" autocast; k: features a token of TopK; sparsity: weight of the penalty;
    rate: learning rate; chunk: steps of a turn; held: held-out tokens."""

    layers: int
    width: int
    features: int
    batch: int
    steps: int
    chunk: int
    precision: str = "no"
    k: int = 32
    sparsity: float = 2e-3
    rate: float = 0.0
    seed: int = 0
    held: int = HELD


@dataclass
class Side:
    """A process that works when it is told to. turns: what it answered, one a chunk."""

    name: str
    process: subprocess.Popen
    turns: list[dict]

    def answer(self) -> None:
        """Read one answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with status {self.process.wait()}; run `python benchmarks/{Path(self.process.args[1]).name}` "
                     "by hand to see why")
        self.turns.append(json.loads(line))

    def go(self, line: str = "go") -> None:
        """Tell it to work, and wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.answer()


def started(name: str, python: Path, script: str, *words: str) -> Side:
    """A side, ready for its first turn."""
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([str(python), str(HERE / script), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env=os.environ | quiet)
    side = Side(name, process, [])
    side.answer()
    return side


def raced(sides: list[Side], turns: int, between: Callable[[], None] = lambda: None) -> None:
    """Each side works in turn, in an order that reverses; `between` runs once a turn."""
    for turn in range(turns):
        for side in sides if turn % 2 else sides[::-1]:
            side.go()
        between()
    for side in sides:
        assert side.process.stdin is not None
        side.process.stdin.write("\n")
        side.process.stdin.flush()
        side.process.wait()


# ------------------------------------------------------------------------------------------------------ fits


def llama(width: int, layers: int, length: int):
    """A Llama of random weights, large enough for its MLPs to bend, and the sites of its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8,
                         num_key_value_heads=8, max_position_embeddings=length, tie_word_embeddings=True, initializer_range=width**-0.5)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def stored(folder: Path, job: Job) -> None:
    """What every MLP reads and writes, in the file that all sides read."""
    length, model = 128, llama(job.width, job.layers, 128)
    host, mlps = Host(model, None, sites(model)), [site for site in sites(model) if site.kind == "mlp"]  # type: ignore[arg-type]
    rows = (min(BATCHES, job.steps) * job.batch + job.held) // length
    odds = 1 / torch.arange(1, VOCABULARY + 1).float()
    ids = torch.multinomial(odds, rows * length, replacement=True, generator=torch.Generator().manual_seed(0)).view(rows, length)
    made: dict[str, list[torch.Tensor]] = {f"{kind}.{layer}": [] for kind in "xy" for layer in range(job.layers)}
    for some in ids.split(16):
        found = record(host, some)
        for layer, site in enumerate(mlps):
            made[f"x.{layer}"].append(found.inputs[site.name].flatten(0, 1))
            made[f"y.{layer}"].append(found.outputs[site.name].flatten(0, 1))
    save_file({name: torch.cat(some).contiguous() for name, some in made.items()}, folder / "data.safetensors")


def products(job: Job) -> dict[str, float]:
    """Operations a processor second of a step's five products, by precision."""
    found = {}
    for name, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        x, a = torch.ones(job.batch, job.width, dtype=dtype), torch.ones(job.batch, job.features, dtype=dtype)
        w, start = torch.ones(job.features, job.width, dtype=dtype), time.process_time()
        x @ w.T, a @ w, x @ w.T, a.T @ x, a.T @ x
        found[name] = 10 * job.batch * job.width * job.features / (time.process_time() - start)
    return found


def race(job: Job, against: dict[str, tuple[Path, str, dict]]) -> dict:
    """One shape and precision, every contender (label -> interpreter, side, changes of the job): rates, ratios to ours, and FVU by time."""
    rates: dict[str, list[float]] = {"no": [], "bf16": []}

    def between() -> None:
        for name, rate in products(job).items():
            rates[name].append(rate)

    with tempfile.TemporaryDirectory() as folder:
        stored(Path(folder), job)
        sides = []
        for label, (python, side, changes) in against.items():
            task = replace(job, rate=0.0 if side == "sparsify" else RATE / job.width, **changes)
            sides.append(started(label, python, "peers_fit.py", side, folder, json.dumps(asdict(task))))
        between()
        raced(sides, job.steps // job.chunk, between)
    speeds = {side.name: [job.chunk * job.batch / turn["processor"] for turn in side.turns[2:]] for side in sides}
    done = {name: statistics.median(all_) for name, all_ in rates.items()}
    rows = {}
    for side in sides:
        speed, precision = statistics.median(speeds[side.name]), against[side.name][2].get("precision", job.precision)
        mine = ratio(speeds["ours " + precision], speeds[side.name]) if "ours " + precision in speeds else None
        rows[side.name] = {
            "precision": precision, "tokens_per_second": speed, "ours_over_it": ratio(speeds["ours bf16"], speeds[side.name]).to_json(),
            "ours_over_it_same_precision": mine and mine.to_json(),
            "share": 10 * job.width * job.features * job.layers * speed / done[precision], "fvu": [turn["fvu"] for turn in side.turns],
            "l0": [turn["l0"] for turn in side.turns], "seconds": [turn.get("processor", 0.0) for turn in side.turns]}
    for row in rows.values():
        row["equal_fvu"], row["ours_over_it_to_equal_fvu"] = to_equal(rows["ours bf16"], row)
    return {"job": asdict(job), "rates": {side: RATE / job.width for side in ("ours", "sae_lens")}, "matrix_rate": done, "sides": rows}


JOBS = [Job(1, 128, 1024, 2048, 120, 10), Job(1, 512, 4096, 2048, 150, 10), Job(4, 128, 1024, 2048, 20, 4), Job(1, 256, 2048, 2048, 24, 4),
        Job(1, 1024, 8192, 1024, 5, 1)]
"""Widths and layers; steps by what a machine of two cores has time for."""
MEMORY = [Job(1, width, 8 * width, 2048, 4, 2, held=64) for width in (128, 512, 1024)]
"""Few steps, and so few held-out tokens that training holds most."""


def contenders(peers: Path) -> dict[str, tuple[Path, str, dict]]:
    """The sides of every race. sae_lens' default precision and sparsify's only one on a processor is float32; ours is bf16 where it is native."""
    here, there = Path(sys.executable), peers / "bin" / "python"
    weak = {"sparsity": 0.03}  # of sae_lens' L1: about our active features
    return {"ours bf16": (here, "ours", {"precision": "bf16"}), "ours no": (here, "ours", {}),
            "sae_lens no": (here, "sae_lens", weak), "sae_lens bf16": (here, "sae_lens", weak | {"precision": "bf16"}),
            "sparsify k 32": (there, "sparsify", {}), "sparsify k 128": (there, "sparsify", {"k": 128})}


def fits(peers: Path, found: dict) -> None:
    """Every shape; those that are in the results already are kept."""
    found["fits"] = [one for one in found.get("fits", []) if any(one["job"] == asdict(job) for job in JOBS)]
    for job in JOBS:
        if not any(one["job"] == asdict(job) for one in found["fits"]):
            found["fits"].append(race(job, contenders(peers)))
            write_json(RESULTS, found)


def memory(peers: Path, found: dict) -> None:
    """The most that each side holds while it trains beyond what it held when it was ready to, in bytes, by shape."""
    found["memory"] = []
    for job in MEMORY:
        with tempfile.TemporaryDirectory() as folder:
            stored(Path(folder), job)
            row: dict[str, int] = {}
            for label, (python, side, changes) in contenders(peers).items():
                task = replace(job, rate=0.0 if side == "sparsify" else RATE / job.width, **changes)
                one = started(label, python, "peers_fit.py", side, folder, json.dumps(asdict(task)))
                raced([one], job.steps // job.chunk)
                row[label] = one.turns[-1]["held_most"] - one.turns[0]["holds"]
        found["memory"].append({"job": asdict(job), "bytes": row})
        write_json(RESULTS, found)


def reached(curve: dict, level: float) -> float:
    """Processor seconds to the FVU `level`, between two chunks by a straight line."""
    spent = 0.0
    if curve["fvu"][0] <= level:
        return spent
    for before, after, seconds in zip(curve["fvu"][:-1], curve["fvu"][1:], curve["seconds"][1:], strict=True):
        if after <= level:
            return spent + seconds * (before - level) / (before - after)
        spent += seconds
    raise ValueError(f"FVU {level} was not reached; ask for one that was")


def to_equal(mine: dict, other: dict) -> tuple[float, float]:
    """The best FVU that both reached, and how many times our seconds to it the other took."""
    level = max(min(mine["fvu"]), min(other["fvu"]))
    return level, reached(other, level) / reached(mine, level)


# ------------------------------------------------------------------------------------------------------ prompt graphs


@dataclass(frozen=True)
class Graph:
    """One race of prompt graphs. per_layer: features of each transcoder; features: feature nodes asked of circuit-tracer, 0 for all active ones;
    batch: targets of one of its backward passes."""

    layers: int
    width: int
    per_layer: int
    tokens: int
    features: int = 1000
    batch: int = 64


GRAPHS = [Graph(4, 256, 2048, 16), Graph(4, 256, 2048, 64), Graph(8, 256, 2048, 16), Graph(4, 512, 4096, 16), Graph(4, 256, 2048, 16, 0)]
TRACES = 4
"""Turns, the first left out."""
ACTIVE = -1.9
"""Bias of random features whose drives have unit variance: 3 % of them are active."""


def written(folder: Path, shape: Graph) -> dict:
    """The model and its random transcoders, in circuit-tracer's file format; returns what both sides are told of the prompt."""
    tokenizer = load(find("builtin:base")).tokenizer
    llama(shape.width, shape.layers, shape.tokens).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "transcoders").mkdir()
    (folder / "transcoders" / "config.yaml").write_text("model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
                                                        "feature_output_hook: mlp.hook_out\nscan: random\n")
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) / shape.width**0.5

    for layer in range(shape.layers):
        weights = {"W_enc": drawn(shape.per_layer, shape.width), "b_enc": torch.full((shape.per_layer,), ACTIVE),
                   "W_dec": drawn(shape.per_layer, shape.width), "b_dec": torch.zeros(shape.width)}
        save_file(weights, folder / "transcoders" / f"layer_{layer}.safetensors")
    ids = torch.randint(4, VOCABULARY, (shape.tokens - 1,), generator=generator).tolist()
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    return asdict(shape) | {"ids": [tokenizer.bos_token_id, *ids], "special": special}


def trace_race(peers: Path, shape: Graph) -> dict:
    """One shape. Ends the program where the two sides do not agree on the model or on the active features."""
    with tempfile.TemporaryDirectory() as name:
        task = json.dumps(written(Path(name), shape))
        sides = [started("ours", Path(sys.executable), "peers_trace.py", "ours", name, task),
                 started("circuit_tracer", peers / "bin" / "python", "peers_trace.py", "circuit_tracer", name, task)]
        known = [side.turns[0] for side in sides]
        apart = max(abs(a - b) for a, b in zip(known[0]["logits"], known[1]["logits"], strict=True))
        if apart > 1e-3 or abs(known[0]["active"] - known[1]["active"]) > 1e-3 * known[0]["active"]:
            sys.exit(f"{shape}: the sides disagree (logits by {apart:.1e}, active features {known[0]['active']} and {known[1]['active']}); "
                     "read `written` in benchmarks/peers.py against both libraries")
        raced(sides, TRACES)
    theirs = {key: [turn[key] for turn in sides[1].turns[2:]] for key in ("processor", "attribute")}
    mine = {key: [turn[key] for turn in sides[0].turns[2:]] for key in ("processor", "matched") if key in sides[0].turns[-1]}
    return {"graph": asdict(shape), "active": known[0]["active"], "logits_apart": apart,
            "seconds": {"ours": statistics.median(mine["processor"]), "circuit_tracer": statistics.median(theirs["processor"]),
                        "matched": statistics.median(mine["matched"]) if "matched" in mine else None},
            "ratio": ratio(theirs["processor"], mine["processor"]).to_json(),
            "ratio_matched": ratio(theirs["processor"], mine["matched"]).to_json() if "matched" in mine else None,
            "made": {side.name: {key: one for key, one in side.turns[-1].items() if not isinstance(one, float)} for side in sides}}


def traces(peers: Path, found: dict) -> None:
    """Every shape; those that are in the results already are kept."""
    for shape in GRAPHS:
        if not any(one["graph"] == asdict(shape) for one in found.setdefault("traces", [])):
            found["traces"].append(trace_race(peers, shape))
            write_json(RESULTS, found)


def main(what: str, peers: Path) -> None:
    """Measure one part and write it beside the others. peers: a virtual environment that holds them."""
    needed = {"fit": "sparsify", "memory": "sparsify", "trace": "circuit_tracer"}[what]
    python = peers / "bin" / "python"
    if not python.is_file() or subprocess.run([str(python), "-c", f"import {needed}"], capture_output=True).returncode:
        sys.exit(f"{peers}: no environment that imports {needed}; make it with the first command of benchmarks/peers.py --help")
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found |= {"torch": torch.__version__, "versions": found.get("versions", {}) | versions(python)}
    {"fit": fits, "memory": memory, "trace": traces}[what](peers, found)


def versions(python: Path) -> dict[str, str]:
    """Of every library in the race."""
    code = ("import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'eai-sparsify', "
            "'circuit-tracer')}))")
    there = json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
    return {"sae_lens": version("sae-lens"), **{f"peers: {name}": one for name, one in there.items()}}


if __name__ == "__main__":
    from words import words

    half, folder = words(__doc__, lambda given: len(given) == 2 and given[0] in ("fit", "memory", "trace"))
    main(half, Path(folder))
