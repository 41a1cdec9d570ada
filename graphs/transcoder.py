"""Transcoders: sparse ReLU dictionaries that stand in for an MLP (Dunefsky et al. 2024, "Transcoders find interpretable
LLM feature circuits").

    a = relu(w_enc x + b_enc)        x: what the MLP reads (the normalised residual stream)
    y = w_dec' a + b_dec             y: what the MLP writes
      + skip_out' skip_in x          with a linear skip of rank r, where one is asked for (Paulo et al. 2025, "Transcoders beat SAEs")

Feature is the first axis of every weight, so pruning is `w[kept]`. A gate of 0 replaces a feature by its mean activation
on clean text (mean ablation), so that removing it for good is exact: its mean contribution folds into `b_dec`.
On disk a transcoder is a folder that `sae_lens.SAE.load_from_disk` opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.artifact import read_json, write_json
from graphs.dictionary import Act, Dictionary, Gated, Identity, JumpReLU, Part, ReLU, TopK

BY_FEATURE = ("w_enc", "b_enc", "w_dec", "mean", "w_gate", "b_gate")
"""Weights whose first axis is the feature."""
WHOLE = ("b_dec", "skip_in", "skip_out")
"""The others."""


class Transcoder(nn.Module):
    """One ReLU transcoder. gate: None, or one number a feature (1 kept, 0 mean-ablated); a skip is never gated."""

    mean: Float[Tensor, "feature"]

    def __init__(self, features: int, d_in: int, d_out: int, generator: torch.Generator | None = None, skip: int = 0) -> None:
        super().__init__()
        self.w_enc = nn.Parameter(torch.randn(features, d_in, generator=generator) / d_in**0.5)
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.w_dec = nn.Parameter(torch.randn(features, d_out, generator=generator) / features**0.5)
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.skip_in = nn.Parameter(torch.randn(skip, d_in, generator=generator) / d_in**0.5) if skip else None
        self.skip_out = nn.Parameter(torch.zeros(skip, d_out)) if skip else None
        self.register_buffer("mean", torch.zeros(features))
        self.gate: Tensor | None = None
        self.last: Tensor | None = None
        """Activations of the last forward pass; set only while `watch` is on (penalties and statistics read them)."""
        self.watch = False

    @property
    def features(self) -> int:
        """How many features there are."""
        return self.w_enc.shape[0]

    @property
    def folds(self) -> bool:
        """Whether a dropped feature's mean may move into the output bias."""
        return True

    @property
    def skip(self) -> int:
        """Rank of the linear skip."""
        return 0 if self.skip_in is None else len(self.skip_in)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Feature activations, before any gate."""
        return torch.relu(nn.functional.linear(x, self.w_enc, self.b_enc))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The MLP's stand-in output."""
        activations = self.encode(x)
        if self.watch:
            self.last = activations
        if self.gate is not None:
            activations = self.mean + self.gate * (activations - self.mean)
        written = activations @ self.w_dec + self.b_dec
        return written if self.skip_in is None else written + self.through(x)

    def through(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the linear skip writes."""
        assert self.skip_in is not None and self.skip_out is not None
        return nn.functional.linear(x, self.skip_in) @ self.skip_out

    def dictionary(self) -> Dictionary:
        """The same map as nodes of a graph: features, then the skip's."""
        parts = [Part(self.w_enc.detach(), self.b_enc.detach(), self.w_dec.detach())]
        if self.skip_in is not None and self.skip_out is not None:
            parts.append(Part(self.skip_in.detach(), self.b_enc.new_zeros(self.skip), self.skip_out.detach(), Identity()))
        return Dictionary(tuple(parts), self.b_dec.detach())

    def like(self, features: int) -> Transcoder:
        """An empty one of the same kind."""
        return Transcoder(features, self.w_enc.shape[1], self.w_dec.shape[1], skip=self.skip)

    def keep(self, kept: Int[Tensor, "kept"]) -> Transcoder:
        """A smaller one of the kept features; the mean contribution of the others moves into `b_dec`."""
        small, dropped = self.like(len(kept)), torch.ones(self.features, dtype=torch.bool)
        dropped[kept] = False
        held = {name: value[kept] if name in BY_FEATURE else value for name, value in self.weights().items()}
        small.set_weights(held | {"b_dec": self.b_dec + self.mean[dropped] @ self.w_dec[dropped]})
        return small

    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name, means included."""
        return {name: value.detach() for name in (*BY_FEATURE, *WHOLE) if (value := getattr(self, name, None)) is not None}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in by their names."""
        for name, value in weights.items():
            getattr(self, name).copy_(value)

    def save(self, folder: Path, site: str) -> None:
        """Write sae_lens' transcoder format (cfg.json, sae_weights.safetensors; their axes put d_in and d_out outside), and beside it
        what that has no place for: means, and the factors of W_skip."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {"W_enc": self.w_enc.T, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        own = {"mean": self.mean}
        if self.skip_in is not None and self.skip_out is not None:
            weights["W_skip"] = self.skip_out.T @ self.skip_in
            own |= {"skip_in": self.skip_in, "skip_out": self.skip_out}
        for held, name in ((weights, "sae_weights"), (own, "means")):
            save_file({key: value.detach().contiguous() for key, value in held.items()}, folder / f"{name}.safetensors")
        write_json(folder / "cfg.json", {
            "architecture": "skip_transcoder" if self.skip else "transcoder",
            "d_in": self.w_enc.shape[1], "d_sae": self.features, "d_out": self.w_dec.shape[1],
            "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {"site": site}})

    @staticmethod
    def load(folder: Path) -> Transcoder:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        config, weights = read_json(folder / "cfg.json"), load_file(folder / "sae_weights.safetensors")
        own = load_file(folder / "means.safetensors")
        loaded = Transcoder(config["d_sae"], config["d_in"], config["d_out"], skip=len(own["skip_in"]) if "skip_in" in own else 0)
        loaded.set_weights({"w_enc": weights["W_enc"].T, "b_enc": weights["b_enc"], "w_dec": weights["W_dec"], "b_dec": weights["b_dec"]} | own)
        return loaded


def relu_units(part: Part) -> Part:
    """The part as ReLU units that compute the same: what a stock MLP holds. Raises ValueError where there are none, with the way out."""
    match part.gate:
        case ReLU():
            return part
        case Identity():  # x = relu(x) - relu(-x)
            both = (torch.cat([part.read, -part.read]), torch.cat([part.bias, -part.bias]), torch.cat([part.write, -part.write]))
            return Part(*both)
        case JumpReLU():
            raise ValueError("JumpReLU jumps at its threshold and no stock MLP does: refit with ReLU (distill fit), or run the graph itself")
        case TopK():
            raise ValueError("TopK looks at all features of a token and no stock MLP does: refit with ReLU (distill fit), or run the graph itself")
        case Act(name):
            raise ValueError(f"{name} neurons live only in a class with that activation: keep the model's own MLP, or refit with ReLU (distill fit)")
        case Gated(name):
            raise ValueError(f"gated {name} neurons live only in a class with a gated MLP: keep the model's own, or refit with ReLU (distill fit)")


def of_dictionary(dictionary: Dictionary) -> Transcoder:
    """A transcoder that computes the same, to be healed and compiled. Raises ValueError as `relu_units` does."""
    whole = Dictionary(tuple(relu_units(part) for part in dictionary.parts), dictionary.constant)
    made = Transcoder(whole.count, whole.reads.shape[1], whole.writes.shape[1])
    made.set_weights({"w_enc": whole.reads, "b_enc": whole.biases, "w_dec": whole.writes, "b_dec": whole.constant})
    return made
