"""Listening to a model while it runs: what a graph needs of the last token of each pass, noted where it appears.

A monitor that asks before every token must not run the model a second time. Hooks on the model's own pass note, at the last token alone, what
each site reads, 1 / scale of its norm, what it writes, and what its heads put side by side before the output projection, which *are* the
activations of its components: patterns sum to 1, so a value's bias arrives whole. No pattern is asked for (attention runs as it always does), a
KV cache works as it is, and what is done beside the pass grows with the number of rows and not with their length. An attention module that stands in
for the model's runs beside it on what it reads, with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from graphs.activations import first
from graphs.architectures import Site, architecture, norm, output_name, post_norm, projected
from graphs.components import Components
from graphs.edges import Reconstruction
from graphs.familiar import Here, Parents, SiteSeen, seen_at
from graphs.host import Host


class Listener:
    """Notes the last token of every pass of `subject`'s model while it is entered. Raises ValueError where a site's components are not the
    value dimensions of the module that routes them: what its heads put out is then in another basis."""

    def __init__(self, subject: Reconstruction, parents: Parents) -> None:
        self.subject, self.parents = subject, parents
        self.passes = 0
        """How many there were since it was entered."""
        self._sites: dict[str, dict[str, Tensor]] = {}
        self._ends: dict[str, Tensor] = {}
        self._ids: Int[Tensor, "row token"] = torch.zeros(1, 0, dtype=torch.long)
        self._caches: Any = None
        self._handles: list[RemovableHandle] = []
        for site in subject.host.sites:
            part = subject.basis[site.name]
            if isinstance(part, Components) and not torch.equal(projected(subject.host.model, self._router(site), 2)[0], part.read):
                raise ValueError(f"{site.name}: its components are in another basis than the attention module that routes them; give the "
                                 "components of the module itself")

    def __enter__(self) -> Listener:
        model: Any = self.subject.host.model
        self.passes = 0
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._handles.append(model.get_submodule(architecture(model).final_norm).register_forward_pre_hook(self._final))
        self._handles.append(model.get_output_embeddings().register_forward_hook(self._said))
        for site in self.subject.host.sites:
            self._listen(site)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._caches = [], None

    @property
    def ids(self) -> Int[Tensor, "row"]:
        """The token that each row of the last pass ended in."""
        return self._ids[:, -1]

    def here(self) -> Here:
        """The last token of each row of the last pass. Raises ValueError where there was none."""
        if not self.passes:
            raise ValueError("the model has not run since the listener was entered: run the very model that it listens to")
        table: Any = self.subject.host.model.get_input_embeddings()
        found = {}
        for site in self.subject.host.sites:
            got, post = self._sites[site.name], post_norm(self.subject.host.model, site)
            routed = got.get("heads")
            if routed is not None and post is not None:
                routed = routed * post.inverse(got["inside"])[:, None]
            found[site.name] = SiteSeen(got["x"], norm(self.subject.host.model, site.norm).inverse(got["stream"]), got["y"], routed)
        through = norm(self.subject.host.model, architecture(self.subject.host.model).final_norm)
        return seen_at(self.subject, self.parents, table(self.ids[:, None])[:, 0], found, through.inverse(self._ends["stream"]), self._ends["logits"],
                       self.ids)

    def _router(self, site: Site) -> nn.Module:
        """The attention module whose heads carry the components of a site."""
        return self.subject.stand_ins.get(site.name) or self.subject.host.module(site.module)

    def _last(self, tensor: Tensor) -> Float[Tensor, "row d"]:
        """The last token of each row, whatever axes the class gives its tokens."""
        return tensor.detach().reshape(len(self._ids), -1, tensor.shape[-1])[:, -1]

    def _begin(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        from transformers import DynamicCache

        self._ids = (kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]).detach()
        self._sites, self._ends, self.passes = {site.name: {} for site in self.subject.host.sites}, {}, self.passes + 1
        past = kwargs.get("past_key_values")
        if self.subject.stand_ins and (past is None or not past.get_seq_length()):
            self._caches = DynamicCache()

    def _final(self, _module: nn.Module, args: tuple) -> None:
        self._ends["stream"] = self._last(args[0])

    def _said(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        self._ends["logits"] = self._last(output)

    def _listen(self, site: Site) -> None:
        """Hooks at one site."""
        def reads(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            self._sites[site.name] |= {"stream": self._last(args[0] if args else kwargs["hidden_states"]), "x": self._last(output)}

        def wrote(_module: nn.Module, args: tuple, output: Any) -> None:
            self._sites[site.name]["y"] = self._last(first(output))
            if args:
                self._sites[site.name]["inside"] = self._last(args[0])

        def routed(_module: nn.Module, args: tuple) -> None:
            self._sites[site.name]["heads"] = self._last(args[0])

        def beside(_module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
            inside = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "layer_past", "use_cache")}
            self.subject.stand_ins[site.name](*args, **inside, past_key_values=self._caches)

        host = self.subject.host
        self._handles.append(host.module(site.norm).register_forward_hook(reads, with_kwargs=True))
        self._handles.append(host.module(site.writes).register_forward_hook(wrote))
        if site.kind == "attention":
            router = self._router(site)
            self._handles.append(router.get_submodule(output_name(host.model, router)).register_forward_pre_hook(routed))
            if site.name in self.subject.stand_ins:
                self._handles.append(host.module(site.module).register_forward_hook(beside, with_kwargs=True))


@torch.no_grad()
def read_on(listener: Listener, rows: Sequence[Sequence[int]], ahead: int) -> list[Here]:
    """The last token of each row, and then of each token that the model writes after it, greedily: one pass over the rows, and one with its cache for
    each token more, up to `ahead` and to the model's context."""
    host, room = listener.subject.host, listener.subject.host.config.max_position_embeddings - max(map(len, rows))
    with listener:
        cache, mask = prefill(host, rows)
        found = [listener.here()]
        for _ in range(min(ahead, room)):
            positions, mask = mask.sum(1, keepdim=True), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            host.model(input_ids=found[-1].choice[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            found.append(listener.here())
    return found


@torch.no_grad()
def prefill(host: Host, rows: Sequence[Sequence[int]]) -> tuple[Cache, Int[Tensor, "row token"]]:
    """One pass over rows; its cache and the attention mask."""
    from transformers import DynamicCache

    ids, mask = left(rows)
    cache, positions = DynamicCache(config=host.config), (mask.cumsum(1) - 1).clamp(min=0)
    host.model(input_ids=ids, attention_mask=None if bool(mask.all()) else mask, position_ids=positions, past_key_values=cache, use_cache=True,
               logits_to_keep=1)
    return cache, mask


def left(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """Rows padded on the left, and the attention mask that leaves the pads out."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    return ids, (torch.arange(width) >= width - torch.tensor([len(row) for row in rows])[:, None]).long()
