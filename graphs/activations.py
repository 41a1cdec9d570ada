"""Recording: what every site reads and writes on a batch, streamed and never stored.

One forward pass of the host with hooks gives, for each site, the pair a dictionary must reproduce. The hooks are removed
whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from graphs.architectures import architecture, output_name
from graphs.host import Host


@dataclass
class Recording:
    """Inputs and outputs by site name, each "row token d"; heads: what an attention layer's heads write, side by side, before
    the output projection; rotary: the position embeddings attention layers are called with."""

    inputs: dict[str, Float[Tensor, "row token d_in"]] = field(default_factory=dict)
    outputs: dict[str, Float[Tensor, "row token d_out"]] = field(default_factory=dict)
    heads: dict[str, Float[Tensor, "row token d_heads"]] = field(default_factory=dict)
    rotary: tuple[Tensor, Tensor] | None = None
    logits: Float[Tensor, "row token vocabulary"] | None = None


@contextmanager
def hooks() -> Iterator[list[RemovableHandle]]:
    """A list of hook handles that are removed whatever happens."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def streams(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list that forward passes made within add to: the residual stream after each layer, "row token d", with its gradient."""
    found: list[Tensor] = []

    def after(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
        found.append(first(output))

    with hooks() as handles:
        for layer in model.get_submodule(architecture(model).layers).children():
            handles.append(layer.register_forward_hook(after))
        yield found


def first(output):
    """The tensor of a module that may return a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def record(host: Host, ids: Int[Tensor, "row token"], logits: bool = False) -> Recording:
    """Run the host on `ids` and return what each site read and wrote."""
    found, shape = Recording(), (*ids.shape, -1)

    def before(name: str):
        def hook(_module, args, kwargs):
            found.inputs[name] = (args[0] if args else kwargs["hidden_states"]).detach().reshape(shape)
            found.rotary = kwargs.get("position_embeddings", found.rotary)
        return hook

    def inside(name: str):
        def hook(_module, args):
            found.heads[name] = args[0].detach()
        return hook

    def after(name: str):
        def hook(_module, _args, output):
            found.outputs[name] = first(output).detach().reshape(shape)
        return hook

    with hooks() as handles:
        for site in host.sites:
            module = host.module(site.module)
            handles.append(module.register_forward_pre_hook(before(site.name), with_kwargs=True))
            handles.append(host.module(site.writes).register_forward_hook(after(site.name)))
            if site.kind == "attention":
                handles.append(module.get_submodule(output_name(host.model, module)).register_forward_pre_hook(inside(site.name)))
        if logits:
            found.logits = host.model(input_ids=ids).logits
        else:
            host.model.base_model(input_ids=ids)
    return found
