"""The host: a causal language model in a Hugging Face folder, and the sites a graph reads and writes in it.

A model is loaded without custom code and from safetensors only; a pickle is refused before any library sees it, a
truncated file in one sentence.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from graphs.architectures import ARCHITECTURES, Site, shortened, sites
from graphs.artifact import read_json

ATTENTION = "sdpa_float32"
"""Name under which `float32_attention` is registered. It is a matter of running, and no checkpoint stores it."""


def float32_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any):
    """The library's attention, in float32 under CPU autocast: there the bf16 kernel's backward pass is several times slower.

    Autocast is what is asked for, not the queries' type: rotary embeddings make them float32 and autocast would round them again.
    """
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with torch.autocast("cpu", enabled=False):
        out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), weights


AttentionInterface.register(ATTENTION, float32_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass
class Host:
    """A model with its tokenizer and sites. Weights are float32 unless the caller asked otherwise."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        if self.model.config._attn_implementation == "sdpa":  # others (soft caps, GPT-Neo) have only their own
            self.model.set_attn_implementation(ATTENTION)

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    def site(self, name: str) -> Site:
        """The site called `name`."""
        return next(site for site in self.sites if site.name == name)

    def module(self, path: str) -> nn.Module:
        """The submodule at `path`."""
        return self.model.get_submodule(path)


def with_layers(host: Host, kept: Sequence[int]) -> Host:
    """A copy of the host with the kept layers only, numbered anew."""
    model = shortened(host.model, kept)
    return Host(model, host.tokenizer, sites(model))


def check_folder(folder: Path) -> dict:
    """Refuse, in one sentence, a folder that is not a loadable safetensors checkpoint; returns its config.

    Raises ValueError: no such folder, no config, a pickle instead of safetensors, truncated weights, no tokenizer.
    """
    if not folder.is_dir():
        raise ValueError(f"--model {folder}: no such folder (give a model folder, builtin:organism, or a hub id such as owner/name)")
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder}: there is no config.json in it; give a Hugging Face model folder")
    config = read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for file in sorted(folder.glob(pattern))]
    if not weights:
        reason = "it holds no *.safetensors weights; save the model with save_pretrained"
        if pickles:
            reason = f"its weights are a pickle ({pickles[0]}), which can run code; convert it to safetensors"
        raise ValueError(f"--model {folder}: {reason}")
    for file in weights:
        check_safetensors(file)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")):
        raise ValueError(f"--model {folder}: there is no tokenizer in it (tokenizer.json); save one beside the model")
    return config


def check_safetensors(file: Path) -> None:
    """Raise ValueError where the file's length is not what its own header says (a truncated copy)."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(handle.read(length))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        complete = 8 + length + end == size
    except (struct.error, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{file} is truncated or damaged: copy it again")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Host:
    """Load a checked local folder. Raises ValueError (one sentence) on anything that is not of a class in `ARCHITECTURES`."""
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True)
    model.eval()
    return Host(model, tokenizer, sites(model))


def skeleton(folder: Path) -> Host:
    """The model's shapes without its weights (on the meta device), for what is to be known before any work. Raises ValueError as `load` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True), dtype=torch.float32)
    return Host(model, tokenizer, sites(model))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that can be loaded."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are the bars a user waits for
    config = check_folder(folder)
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"--model {folder}: architecture {architecture} is not supported yet; choose from {', '.join(ARCHITECTURES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # every tokenizer backend has errors of its own
        raise ValueError(f"--model {folder}: its tokenizer cannot be loaded ({type(error).__name__}); save it again with save_pretrained") from error


def save(host: Host, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a stock checkpoint (weights, tokenizer, generation config) with `save_pretrained` only."""
    before = host.model.dtype
    host.model.to(dtype)  # type: ignore[arg-type]
    try:
        host.model.save_pretrained(folder, safe_serialization=True)
        host.tokenizer.save_pretrained(folder)
    finally:
        host.model.to(before)  # type: ignore[arg-type]
