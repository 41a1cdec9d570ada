"""One side of the race of fits (`peers.py` starts it): one library's own trainer on stored activations, a chunk of steps at a time.

    PYTHON peers_fit.py ours|sae_lens|sparsify FOLDER JOB

Runs in the environment of the library that it names and needs nothing else of this project there. The trainer is the library's public one and
runs as its users run it; only its next batch waits, at every end of a chunk, for a line on standard input. Each line is answered with one of JSON:
processor and wall seconds of the chunk's steps, and, outside the time, FVU and active features on held-out tokens; memory in bytes: what the
process holds (at the first answer, ready to train) and the most that it has held. An empty line ends it.

FOLDER/data.safetensors: x.N, y.N (what an MLP reads and writes, "token d"), held-out tokens last; JOB: a JSON object (`peers.Job`).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Predict = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Layer, inputs -> outputs and active features a token."""


class Feed:
    """Stored batches, in order and over again; the clock runs while the trainer works."""

    def __init__(self, folder: Path, job: dict) -> None:
        data = load_file(folder / "data.safetensors")
        self.pairs = [(data[f"x.{layer}"], data[f"y.{layer}"]) for layer in range(job["layers"])]
        self.batch, self.chunk, self.steps, self.held = job["batch"], job["chunk"], job["steps"], job["held"]
        self.predict: Predict | None = None
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what trainers print is no answer

    def at(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The batch of a step, by layer. Waits where a chunk ended."""
        if step % self.chunk == 0:
            self.turn(step)
        rows = self.rows(step)
        return [(x[rows], y[rows]) for x, y in self.pairs]

    def rows(self, step: int) -> slice:
        """Where a step's batch lies."""
        count = (len(self.pairs[0][0]) - self.held) // self.batch
        return slice(step % count * self.batch, (step % count + 1) * self.batch)

    def turn(self, step: int) -> None:
        """Answer with the chunk that ended, and wait for the next line."""
        spent = [time.process_time(), time.perf_counter()]
        found = {"step": step} | self.judged() | memory()
        if step:
            found |= {"processor": spent[0] - self.started[0], "wall": spent[1] - self.started[1]}
        self.out.write(json.dumps(found) + "\n")
        self.out.flush()
        if not sys.stdin.readline().strip():
            os._exit(0)
        self.started = [time.process_time(), time.perf_counter()]

    @torch.no_grad()
    def judged(self) -> dict:
        """FVU and L0 on the held-out tokens, means over layers."""
        assert self.predict is not None
        lost, active = [], []
        for layer, (x, y) in enumerate(self.pairs):
            target = y[-self.held:]
            guess, count = self.predict(layer, x[-self.held:])
            lost.append(float((target - guess).square().sum() / (target - target.mean(0)).square().sum()))
            active.append(float(count.float().mean()))
        return {"fvu": sum(lost) / len(lost), "l0": sum(active) / len(active)}


def memory() -> dict[str, int]:
    """What this process holds, and the most that it has held, in bytes."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return {"holds": now, "held_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def ours(feed: Feed, job: dict) -> None:
    """graphs.fit's loss of transcoders, in its training loop. ACCELERATE_MIXED_PRECISION says in what precision."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from graphs.fit import FitConfig, spread_of, start, transcoder_loss
    from graphs.train import TrainConfig, train
    from graphs.transcoder import Transcoder

    os.environ["ACCELERATE_MIXED_PRECISION"] = job["precision"]
    config = FitConfig(features=job["features"], sparsity=job["sparsity"], local_rate=job["rate"])
    generator = torch.Generator().manual_seed(job["seed"])
    parts = [Transcoder(job["features"], x.shape[1], y.shape[1], generator) for x, y in feed.pairs]
    spread = [spread_of(y[: job["batch"]]) for _, y in feed.pairs]
    feed.predict = lambda layer, x: (parts[layer](x), (parts[layer].encode(x) > 0).sum(1))

    def loss(step: int) -> Tensor:
        found = feed.at(step)
        if step == 0:  # part of the fit, so the clock is running
            for part, (x, y) in zip(parts, found, strict=True):
                start(part, x, y)
        return torch.stack([transcoder_loss(part, x, y, config, size) for part, (x, y), size in zip(parts, found, spread, strict=True)]).sum()

    train(nn.ModuleList(parts), loss, TrainConfig(job["steps"], config.local_rate), "ours")
    feed.turn(job["steps"])


def sae_lens(feed: Feed, job: dict) -> None:
    """SAETrainer on packed [x|y] batches, with sae_lens' own ReLU and L1 behind a decoder of the output's width."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class Packed(StandardTrainingSAE):
        """Reads the first half of what it is given and writes the second: `training_forward_pass` as it is there, with another target."""

        def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
            x, y = step_input.sae_in.chunk(2, dim=1)
            acts, before = self.encode_with_hidden_pre(x)
            guess = self.decode(acts)
            error = self.mse_loss_fn(guess, y).sum(dim=-1).mean()
            penalty = self.calculate_aux_loss(step_input, acts, before, guess)
            return TrainStepOutput(sae_in=x, sae_out=guess, feature_acts=acts, hidden_pre=before, loss=error + sum(penalty.values()),
                                   losses={"mse_loss": error, **penalty})

    torch.manual_seed(job["seed"])
    saes = []
    for _, y in feed.pairs:
        scale = float((y - y.mean(0)).square().sum(1).mean().sqrt())
        config = StandardTrainingSAEConfig(d_in=y.shape[1], d_sae=job["features"], l1_coefficient=job["sparsity"] * scale,
                                           apply_b_dec_to_input=False)
        sae = Packed(config)
        sae.b_dec.data = y[: job["batch"]].mean(0)
        saes.append(sae)

    whole = [torch.cat(pair, 1) for pair in feed.pairs]
    feed.pairs = [tuple(both.chunk(2, 1)) for both in whole]  # type: ignore[misc]

    def alone() -> Iterator[Tensor]:
        for step in range(job["steps"]):
            feed.at(step)
            yield whole[0][feed.rows(step)]

    feed.predict = lambda layer, x: (saes[layer].decode(saes[layer].encode(x)), (saes[layer].encode(x) > 0).sum(1))
    samples = job["steps"] * job["batch"]
    settings = SAETrainerConfig(total_training_samples=samples, train_batch_size_samples=job["batch"], lr=job["rate"], lr_end=job["rate"] / 10,
                                autocast=job["precision"] == "bf16")
    trainers = [SAETrainer(settings, sae, alone()) for sae in saes]
    if len(trainers) == 1:
        trainers[0].fit()
    else:  # what MultiSAETrainer does with its trainers
        for step in range(job["steps"]):
            feed.at(step)
            for trainer, both in zip(trainers, whole, strict=True):
                trainer.step(both[feed.rows(step)])
                trainer.n_training_steps += 1
    feed.turn(job["steps"])


class Lookup(nn.Module):
    """A hookpoint that writes what is stored for what it reads."""

    y: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The stored output, one row."""
        return self.y[None]


class Stored(nn.Module):
    """What sparsify's trainer asks of a model; a forward pass runs each hookpoint on the batch's stored pair and computes nothing."""

    device = torch.device("cpu")

    def __init__(self, feed: Feed) -> None:
        super().__init__()
        self.feed, self.step, self.layers = feed, -1, nn.ModuleList([Lookup() for _ in feed.pairs])
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        """Where hookpoints are named from."""
        return self

    def forward(self, input_ids: Tensor) -> None:
        """One batch; the first call asks for widths."""
        found = self.feed.at(self.step) if self.step >= 0 else [(x[:1], y[:1]) for x, y in self.feed.pairs]
        self.step += 1
        for layer, (x, y) in zip(self.layers, found, strict=True):
            layer.y = y
            layer(x[None])


def sparsify(feed: Feed, job: dict) -> None:
    """sparsify's Trainer with its default optimiser, TopK transcoders of the given k; rows of a batch are one sequence."""
    from datasets import Dataset
    from sparsify.config import SparseCoderConfig, TrainConfig
    from sparsify.trainer import Trainer

    class Unsaved(Trainer):
        """Writes nothing to disk at the end."""

        def save(self) -> None:
            """Nothing."""

    rows = Dataset.from_dict({"input_ids": torch.zeros(job["steps"], job["batch"], dtype=torch.long).numpy()}).with_format("torch")
    names = [f"layers.{layer}" for layer in range(job["layers"])]
    coder = SparseCoderConfig(num_latents=job["features"], k=job["k"], transcode=True)
    settings = TrainConfig(coder, batch_size=1, hookpoints=names, init_seeds=[job["seed"]], lr=job["rate"] or None, log_to_wandb=False)
    trainer = Unsaved(settings, rows, Stored(feed))
    optimizer = trainer.optimizers[0]

    def predict(layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.eval()  # schedule-free: the weights that it would save
        coder = trainer.saes[names[layer]]
        acts, where, _ = coder.encode(x)
        guess = coder.decode(acts, where)
        optimizer.train()
        return guess, (acts > 0).sum(1)

    feed.predict = predict
    trainer.fit()
    feed.turn(job["steps"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    task = json.loads(sys.argv[3])
    {"ours": ours, "sae_lens": sae_lens, "sparsify": sparsify}[sys.argv[1]](Feed(Path(sys.argv[2]), task), task)
