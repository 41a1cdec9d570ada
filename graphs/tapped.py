"""A replacement whose every value may be seen, and changed, on its way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.architectures import Site, install
from graphs.attention import Attention
from graphs.host import Host
from graphs.replace import Replacement
from graphs.transcoder import Transcoder

NODE = ".node"
"""Ends the name of what a site's nodes hand on."""
Tap = Callable[[str, Float[Tensor, "row token value"]], Float[Tensor, "row token value"]]
"""Given the name of some values and what they are, what they are to be."""


class Tapped(nn.Module):
    """A copy of a replacement whose every value passes through `tap` (None: as it is). ids: what the last pass read."""

    def __init__(self, replacement: Replacement) -> None:
        super().__init__()
        own = copy.deepcopy(replacement)
        self.model, self.tokenizer, self.sites = own.model, own.tokenizer, own.sites
        self.tap: Tap | None = None
        self.embed: Callable[[Tensor, Tensor], Tensor] | None = None
        self.ids: Int[Tensor, "row token"] = torch.zeros(1, 0, dtype=torch.long)
        self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        table: Any = self.model.get_input_embeddings()
        table.register_forward_hook(lambda _module, args, out: out if self.embed is None else self.embed(args[0], out))
        for site in own.sites:
            self._install(site, own.part(site))

    def host(self) -> Host:
        """The run as a host: generation and every judge work on it as on any model."""
        return Host(self.model, self.tokenizer, self.sites)

    def forward(self, ids: Int[Tensor, "row token"]) -> Float[Tensor, "row token vocabulary"]:
        """Logits."""
        return self.model(input_ids=ids, use_cache=False).logits

    def passed(self, name: str, value: Tensor) -> Tensor:
        """`value` after the tap, whatever axes it has."""
        return value if self.tap is None else self.tap(name, value.reshape(*self.ids.shape, -1)).reshape(value.shape)

    def _begin(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def _install(self, site: Site, part: nn.Module) -> None:
        if isinstance(part, Transcoder):
            install(self.model, site, _MLP(self, site.name, part))
            return
        assert isinstance(part, Attention)
        for name, what in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            part.get_submodule(name).register_forward_hook(lambda _module, _args, out, name=f"{site.name}.{what}": self.passed(name, out))
        part.get_submodule("o_proj").register_forward_pre_hook(lambda _module, args: (self.passed(f"{site.name}.node", args[0]), *args[1:]))


class _MLP(nn.Module):
    """A dictionary whose drives, factors and activations pass through the tap."""

    def __init__(self, run: Tapped, name: str, part: Transcoder) -> None:
        super().__init__()
        self._run, self.name, self.part, self.parts = [run], name, part, part.dictionary().parts  # in a list: the run holds its parts, not they it

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the dictionary writes."""
        run, active = self._run[0], []
        for place, part in enumerate(self.parts):
            name = self.name if len(self.parts) == 1 else f"{self.name}.{place}"
            drive, factor = run.passed(f"{name}.drive", nn.functional.linear(x, part.read, part.bias)), part.factor(x)
            drive = drive if factor is None else drive * run.passed(f"{name}.factor", factor)
            active.append(run.passed(f"{name}.node", part.gate(drive)))
        return torch.cat(active, -1) @ torch.cat([part.write for part in self.parts]) + self.part.b_dec
