"""Listening to a model while it runs: what a graph needs of the last token of each pass, noted where it appears.

A monitor that asks before every token must not run the model a second time. Hooks on the model's own pass note, at the last token alone, what
each site reads, 1 / scale of its norm, what it writes, and what its heads put side by side before the output projection, which *are* the
activations of its components: patterns sum to 1, so a value's bias arrives whole. No pattern is asked for (attention runs as it always does), a
KV cache works as it is, and what is done beside the pass grows with the number of rows and not with their length. An attention module that stands in
for the model's runs beside it on what it reads, with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphs.activations import first
from graphs.architectures import Norm, Site, architecture, norm, output_name, post_norm, projected
from graphs.batches import left_padded
from graphs.components import Components
from graphs.edges import Reconstruction
from graphs.familiar import Here, Parents, SiteSeen, seen_at
from graphs.host import Host


@dataclass(frozen=True)
class Ear:
    """What listening to one site takes. norm, post: of what it reads and, where there is one, of what it writes; reads, writes, out: the modules to
    listen to (out: an attention's output projection); beside: what stands in for the model's attention."""

    site: Site
    norm: Norm
    post: Norm | None
    reads: nn.Module
    writes: nn.Module
    out: nn.Module | None
    beside: nn.Module | None


class Listener:
    """Notes the last token of every pass of `subject`'s model while it is entered. Raises ValueError where a site's components are not the
    value dimensions of the module that routes them: what its heads put out is then in another basis."""

    def __init__(self, subject: Reconstruction, parents: Parents) -> None:
        self.subject, self.parents = subject, parents
        self.passes = 0
        """How many there were since it was entered."""
        self.resting = False
        """While it is set, passes are counted and nothing is noted."""
        model: Any = subject.host.model
        self._ears = [self._ear(site) for site in subject.host.sites]
        self._table, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        path = architecture(model).final_norm
        self._final, self._end = model.get_submodule(path), norm(model, path)
        self._noted: dict[str, dict[str, Tensor]] = {}
        self._ids: Int[Tensor, "row token"] = torch.zeros(1, 0, dtype=torch.long)
        self._cache: Any = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Listener:
        self.passes, self.resting = 0, False
        self._handles = [
            self.subject.host.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._final.register_forward_pre_hook(lambda _module, args: self._note("end", stream=args[0])),
            self._head.register_forward_hook(lambda _module, _args, output: self._note("end", logits=output))]
        for ear in self._ears:
            self._listen(ear)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._cache = [], None

    @property
    def ids(self) -> Int[Tensor, "row"]:
        """The token that each row of the last pass ended in."""
        return self._ids[:, -1]

    @torch.no_grad()
    def here(self) -> Here:
        """The last token of each row of the last pass. Raises ValueError where there was none."""
        if not self.passes or self.resting:
            raise ValueError("the model has not run since the listener was entered: run the very model that it listens to")
        found, end = {}, self._noted["end"]
        for ear in self._ears:
            got = self._noted[ear.site.name]
            routed = got.get("heads")
            if routed is not None and ear.post is not None:
                routed = routed * ear.post.inverse(got["inside"])[:, None]
            found[ear.site.name] = SiteSeen(got["x"], ear.norm.inverse(got["stream"]), got["y"], routed)
        token = self._table(self.ids[:, None])[:, 0]
        return seen_at(self.subject, self.parents, token, found, self._end.inverse(end["stream"]), end["logits"], self.ids)

    def _ear(self, site: Site) -> Ear:
        """Where to listen to a site."""
        host, part, beside, out = self.subject.host, self.subject.basis[site.name], self.subject.stand_ins.get(site.name), None
        if isinstance(part, Components):
            router = beside or host.module(site.module)
            if not torch.equal(projected(host.model, router, 2)[0], part.read):
                raise ValueError(f"{site.name}: its components are in another basis than the attention module that routes them; give the "
                                 "components of the module itself")
            out = router.get_submodule(output_name(host.model, router))
        return Ear(site, norm(host.model, site.norm), post_norm(host.model, site), host.module(site.norm), host.module(site.writes), out, beside)

    def _begin(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        from transformers import DynamicCache

        self._ids, self.passes = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0], self.passes + 1
        self._noted = {name: {} for name in ("end", *(ear.site.name for ear in self._ears))}
        past = kwargs.get("past_key_values")
        if self.subject.stand_ins and (past is None or not past.get_seq_length()):
            self._cache = DynamicCache()

    def _note(self, name: str, **tensors: Tensor) -> None:
        """The last token of each row, whatever axes the class gives its tokens; a copy, so that nothing else of the pass is kept."""
        for key, tensor in tensors.items() if not self.resting else ():
            shaped = tensor if tensor.ndim == 3 else tensor.reshape(len(self._ids), -1, tensor.shape[-1])
            self._noted[name][key] = shaped[:, -1].detach().clone()

    def _listen(self, ear: Ear) -> None:
        """Hooks at one site."""
        name = ear.site.name

        def reads(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            self._note(name, stream=args[0] if args else kwargs["hidden_states"], x=output)

        def wrote(_module: nn.Module, args: tuple, output: Any) -> None:
            self._note(name, y=first(output), **({} if ear.post is None else {"inside": args[0]}))

        def beside(_module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
            inside = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "layer_past", "use_cache")}
            if ear.beside is not None and not self.resting:
                ear.beside(*args, **inside, past_key_values=self._cache)

        self._handles += [ear.reads.register_forward_hook(reads, with_kwargs=True), ear.writes.register_forward_hook(wrote)]
        if ear.out is not None:
            self._handles.append(ear.out.register_forward_pre_hook(lambda _module, args: self._note(name, heads=args[0])))
        if ear.beside is not None:
            self._handles.append(self.subject.host.module(ear.site.module).register_forward_hook(beside, with_kwargs=True))


def read_on(listener: Listener, rows: Sequence[Sequence[int]], ahead: int) -> list[Here]:
    """The last token of each row, and then of each token that the model writes after it (`passes`)."""
    with listener:
        return [listener.here() for _ in passes(listener.subject.host, rows, ahead)]


@torch.no_grad()
def passes(host: Host, rows: Sequence[Sequence[int]], ahead: int) -> Iterator[None]:
    """One pass over rows, and with its cache one for each token more that the model writes, greedily: up to `ahead` and to its context."""
    from transformers import DynamicCache

    ids, mask = left_padded(rows, 0)
    cache, positions = DynamicCache(config=host.config), (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(1 + min(ahead, host.config.max_position_embeddings - ids.shape[1])):
        logits = host.model(input_ids=ids, attention_mask=None if bool(mask.all()) else mask, position_ids=positions, past_key_values=cache,
                            use_cache=True, logits_to_keep=1).logits
        yield
        ids, positions, mask = logits[:, -1:].argmax(-1), mask.sum(1, keepdim=True), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
