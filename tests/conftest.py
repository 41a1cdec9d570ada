"""What several test files share: a tokenizer and a random-weight model small enough to be made anew for each run."""

from __future__ import annotations

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")  # the same numbers on every machine, in this process and in those that it starts
SHAPED = ["graphs", "backdoor", *(f"evals.{name}" for name in ("generate", "capability", "fidelity", "quantisation", "rates", "research", "size"))]
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")  # checks every annotation of the files that handle tensors

from distill import config  # noqa: E402
from distill.base import build_tokenizer, new_model  # noqa: E402
from distill.prune import run as prune  # noqa: E402
from evals.tasks import TASKS, table  # noqa: E402
from graphs.architectures import sites  # noqa: E402
from graphs.host import Host, load, save  # noqa: E402
from tests.planted import Models, trained  # noqa: E402

SHAPE = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96}


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of 600 tokens, trained on the tasks as the base's is."""
    return build_tokenizer(600)


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """A stock Llama folder: two layers of width 48 with random weights, in float32. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = new_model(len(tiny_tokenizer), tiny_tokenizer, 0, **SHAPE)
    save(Host(model, tiny_tokenizer, sites(model)), folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_model_folder, tmp_path_factory) -> Path:
    """A finished run of `distill prune` on the tiny model, with a few steps of everything. Verbs may add to it, tests may not."""
    where = tmp_path_factory.mktemp("run")
    table(TASKS["coding"].rows("trace", 24, seed=3)).to_parquet(where / "rows.parquet")
    prune(config.Prune(model=str(tiny_model_folder), out=where / "run", rows=where / "rows.parquet", features=32, fit_steps=8, joint_steps=4,
                       gate_steps=4, heal_tokens=2000, batch=8, tune_rows=4, prompts=8, keep=-1.0))
    return where / "run"


@pytest.fixture
def tiny_host(tiny_model_folder) -> Host:
    """The tiny model, loaded anew, so that a test may change it."""
    return load(tiny_model_folder)


@pytest.fixture(scope="session")
def models(tiny_model_folder) -> Models:
    """A planted backdoor, its removal, and its twin (tests.planted). Not to be changed."""
    return trained(load(tiny_model_folder))
