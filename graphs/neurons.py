"""The neuron basis: a model's own MLP neurons as prunable features, with no reconstruction error.

    a = act(w_gate x + b_gate) * (w_enc x + b_enc)      gated classes
    a = act(w_enc x + b_enc)                            the others
    y = w_dec' a + b_dec

The same interface as a transcoder, so that gates, pruning, absorption and healing are the same code; what remains of the neurons
compiles into the model's own class. Where that has no biases, a dropped neuron's mean has nowhere to go and is 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphs.architectures import Site, mlp_biased
from graphs.architectures import neurons as own_neurons
from graphs.artifact import read_json, write_json
from graphs.dictionary import Act, Dictionary, Gated, Part
from graphs.transcoder import Transcoder

KIND = "neurons"
"""What cfg.json calls them."""


class Neurons(Transcoder):
    """One MLP. activation: its name in the library; gated: whether there are gate weights; biased: whether the class stores biases;
    linear: while set, gradients give an activation its ratio to its input, and each factor of a product half (RelP's rules)."""

    linear = False

    def __init__(self, activation: str, features: int, d_in: int, d_out: int, gated: bool, biased: bool) -> None:
        super().__init__(features, d_in, d_out)
        self.activation, self.biased = activation, biased
        self.w_gate = nn.Parameter(torch.zeros(features, d_in)) if gated else None
        self.b_gate = nn.Parameter(torch.zeros(features)) if gated else None
        if not biased:
            for bias in (self.b_enc, self.b_dec, self.b_gate):
                if bias is not None:
                    bias.requires_grad_(False)

    @staticmethod
    def of(model: PreTrainedModel, site: Site) -> Neurons:
        """The model's own neurons at `site`."""
        found = own_neurons(model, site)
        part, gate = found.parts[0], found.parts[0].gate
        assert isinstance(gate, Act | Gated)
        name = gate.activation if isinstance(gate, Gated) else gate.name
        made = Neurons(name, len(part.read), site.d_in, site.d_out, isinstance(gate, Gated), mlp_biased(model, site))
        weights = {"w_enc": part.read, "b_enc": part.bias, "w_dec": part.write, "b_dec": found.constant}
        if isinstance(gate, Gated):
            weights |= {"w_gate": gate.read, "b_gate": gate.bias}
        made.set_weights(weights)
        return made

    @property
    def folds(self) -> bool:
        """Whether a dropped neuron's mean may move into the output bias."""
        return self.biased

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Activations, before any gate of ours."""
        drive = nn.functional.linear(x, self.w_enc, self.b_enc)
        if self.w_gate is None:
            return self._act(drive)
        opened = self._act(nn.functional.linear(x, self.w_gate, self.b_gate))
        return 0.5 * (opened.detach() * drive + opened * drive.detach()) if self.linear else opened * drive

    def _act(self, drive: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        out = Act(self.activation)(drive)
        if not self.linear:
            return out
        safe = drive.detach()
        ratio = out.detach() / torch.where(safe.abs() < 1e-6, torch.ones_like(safe), safe)
        return torch.where(safe.abs() < 1e-6, out, ratio * drive)

    def dictionary(self) -> Dictionary:
        """The same map as nodes of a graph."""
        gate = Act(self.activation) if self.w_gate is None or self.b_gate is None else Gated(
            self.activation, self.w_gate.detach(), self.b_gate.detach())
        return Dictionary((Part(self.w_enc.detach(), self.b_enc.detach(), self.w_dec.detach(), gate),), self.b_dec.detach())

    def like(self, features: int) -> Neurons:
        """An empty one of the same kind."""
        return Neurons(self.activation, features, self.w_enc.shape[1], self.w_dec.shape[1], self.w_gate is not None, self.biased)

    def save(self, folder: Path, site: str) -> None:
        """Write neurons.safetensors, feature first, and cfg.json."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.weights().items()}, folder / "neurons.safetensors")
        write_json(folder / "cfg.json", {"architecture": KIND, "activation": self.activation, "biased": self.biased, "metadata": {"site": site}})

    @staticmethod
    def load(folder: Path) -> Neurons:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        config, weights = read_json(folder / "cfg.json"), load_file(folder / "neurons.safetensors")
        (features, d_in), d_out = weights["w_enc"].shape, weights["w_dec"].shape[1]
        made = Neurons(config["activation"], features, d_in, d_out, "w_gate" in weights, config["biased"])
        made.set_weights(weights)
        return made


def read_mlp(folder: Path) -> Transcoder:
    """The transcoder or the neurons that were saved in `folder`."""
    return Neurons.load(folder) if read_json(folder / "cfg.json")["architecture"] == KIND else Transcoder.load(folder)
