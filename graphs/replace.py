"""Running the graph: the host with every MLP and attention layer replaced by its dictionary, and no error nodes.

A `Replacement` shares nothing with the host it came from. Embeddings and unembedding are the host's and stay frozen (tokens that are not
kept are one: `graphs.tokens`); norms are copied and may be healed. Every sublayer has node gates: features of a transcoder (mean-ablated at
0), and KV groups of an attention layer or their components (silenced at 0). `pruned` makes the gates physical, so what is healed, explained, run and
compiled is one and the same object.

In the coarse basis ("layers") whole layers are nodes in the place of features: MLPs are the model's own neurons, all of them. A layer's
gate scales all that both of its sublayers write. At 0 the layer writes nothing, not its mean: a stock checkpoint has no place for a
constant where a layer was, and a dropped one physically leaves the model. The layers that stay are numbered anew, as heads are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.activations import hooks
from graphs.architectures import Site, attention_components, embeddings, install
from graphs.artifact import read_json, write_json
from graphs.attention import Attention, GroupGate, groups, keep_groups, keep_nodes, refreshed, standing_in, width
from graphs.components import Components
from graphs.dictionary import Dictionary
from graphs.edges import Basis
from graphs.host import Host, with_layers
from graphs.neurons import Neurons, read_mlp
from graphs.tokens import merge_others
from graphs.transcoder import Transcoder

LAYERS = "layers"
"""Where gates, scores and kept nodes hold those of whole layers, beside the names of sites."""
TOKENS = "tokens"
"""Where the nodes of a saved replacement name the token nodes that are kept, if not all are."""


class Replacement(nn.Module):
    """The replacement model. layers: which of the model's layers these are, where whole layers are nodes; None where features are. tokens: the
    vocabulary's entries that are kept; None: all."""

    def __init__(
        self, host: Host, parts: Mapping[str, nn.Module], trained: Mapping[str, Tensor] | None = None, layers: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = None if layers is None else tuple(layers)
        self.tokens: tuple[int, ...] | None = None
        self.model = copy.deepcopy(host.model)
        self.tokenizer, self.sites = host.tokenizer, host.sites
        self.group_gates: dict[str, GroupGate] = {}
        for site in host.sites:
            install(self.model, site, parts[site.name])
            if site.kind == "attention":
                parts[site.name].config = self.model.config  # type: ignore[assignment]  # one for all: `trace` changes how attention runs
                gate = self.group_gates[site.name] = GroupGate(groups(parts[site.name]), width(parts[site.name]))
                parts[site.name].get_submodule("o_proj").register_forward_pre_hook(gate)
        for table in embeddings(self.model):
            table.requires_grad_(False)
        if trained:
            self.model.load_state_dict(dict(trained), strict=False)
        if tokens is not None:
            self.keep_tokens(tokens)

    def keep_tokens(self, tokens: Sequence[int]) -> None:
        """Keep these entries of the vocabulary alone, in place."""
        merge_others(self.host(), tokens)
        self.tokens = tuple(tokens)

    def part(self, site: Site) -> nn.Module:
        """The dictionary at `site`."""
        return self.model.get_submodule(site.module)

    def transcoders(self) -> dict[str, Transcoder]:
        """The transcoders by site name."""
        return {site.name: part for site in self.sites if isinstance(part := self.part(site), Transcoder)}

    def attention(self) -> dict[str, Attention]:
        """The attention layers by site name."""
        return {site.name: part for site in self.sites if isinstance(part := self.part(site), Attention)}

    def node_counts(self, components: bool = False) -> dict[str, int]:
        """Nodes at each site: features, and KV groups or their components; in the coarse basis KV groups, and the layers."""
        found = {}
        for site in self.sites:
            part = self.part(site)
            if not isinstance(part, Transcoder):
                found[site.name] = groups(part) * (width(part) if components else 1)
            elif self.layers is None:
                found[site.name] = part.features
        return found if self.layers is None else found | {LAYERS: len(self.layers)}

    def origin(self, site: Site) -> str:
        """What `site` is called in the model before any layer was dropped."""
        return f"L{site.layer if self.layers is None else self.layers[site.layer]}.{site.kind}"

    def basis(self) -> Basis:
        """The nodes of the graph this replacement runs: features, and attention components."""
        made: dict[str, Dictionary | Components] = {}
        for site in self.sites:
            part = self.part(site)
            made[site.name] = part.dictionary() if isinstance(part, Transcoder) else attention_components(self.model, site, part)
        return made

    def host(self) -> Host:
        """The replacement as a host: generation and every judge run on it as on any model."""
        return Host(self.model, self.tokenizer, self.sites)

    def forward(self, ids: Int[Tensor, "row token"]) -> Float[Tensor, "row token vocabulary"]:
        """Logits."""
        return self.model(input_ids=ids).logits

    @contextmanager
    def gated(self, gates: Mapping[str, Float[Tensor, "_node"]]) -> Iterator[None]:
        """Run with node gates by site name, and those of layers; what has no entry runs whole."""
        self._set(gates)
        try:
            with hooks() as handles:
                for site in self.sites if LAYERS in gates else ():
                    handles.append(self.model.get_submodule(site.writes).register_forward_hook(_scaled(gates[LAYERS][site.layer])))
                yield
        finally:
            self._set({})

    def _set(self, gates: Mapping[str, Tensor]) -> None:
        for name, transcoder in self.transcoders().items():
            transcoder.gate = gates.get(name)
        for name, hook in self.group_gates.items():
            hook.gate = gates.get(name)

    def pruned(self, kept: Mapping[str, Int[Tensor, "_kept"]], components: bool = False) -> Replacement:
        """A physically smaller replacement that holds only the kept nodes. components: attention's are components, not groups.

        In the coarse basis `kept` has the kept layers under `LAYERS`, and their groups by the names that sites have now: here layers close ranks.
        """
        if self.layers is not None:
            return self._shortened(kept, self.layers)
        parts: dict[str, nn.Module] = {}
        for site in self.sites:
            part = self.part(site)
            parts[site.name] = part.keep(kept[site.name]) if isinstance(part, Transcoder) else keep_nodes(
                part, kept[site.name], width(part) if components else 1)
        return Replacement(self.host(), parts, tokens=self.tokens)

    def _shortened(self, kept: Mapping[str, Int[Tensor, "_kept"]], layers: tuple[int, ...]) -> Replacement:
        """The kept layers with all their neurons and the kept heads."""
        places, parts = kept[LAYERS].tolist(), {}
        host = with_layers(self.host(), places)
        for site in host.sites:
            part = host.module(site.module)
            parts[site.name] = part.keep(torch.arange(part.features)) if isinstance(part, Transcoder) else keep_groups(
                part, kept[f"L{places[site.layer]}.attention"])
        return Replacement(host, parts, layers=[layers[place] for place in places], tokens=self.tokens)

    def save(self, folder: Path) -> None:
        """Write each transcoder as a sae_lens folder, everything else trained as one safetensors file."""
        from safetensors.torch import save_file

        for name, transcoder in self.transcoders().items():
            transcoder.save(folder / name, name)
        mlps = tuple(site.module + "." for site in self.sites if isinstance(self.part(site), Transcoder))
        frozen = {id(p) for table in embeddings(self.model) for p in table.parameters()}
        rest = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if not name.startswith(mlps) and id(p) not in frozen}
        save_file(rest, folder / "attention_and_norms.safetensors")
        extra = {name: list(one) for name, one in ((LAYERS, self.layers), (TOKENS, self.tokens)) if one is not None}
        write_json(folder / "nodes.json", self.node_counts() | extra)

    @staticmethod
    def load(folder: Path, host: Host) -> Replacement:
        """Read what `save` wrote; `host` gives embeddings, tokenizer and shapes: the whole model, where layers were dropped too."""
        from safetensors.torch import load_file

        counts, trained = read_json(folder / "nodes.json"), load_file(folder / "attention_and_norms.safetensors")
        layers = counts.get(LAYERS)
        host = host if layers is None else with_layers(host, layers)
        parts: dict[str, nn.Module] = {}
        for site in host.sites:
            if site.kind == "mlp":
                parts[site.name] = read_mlp(folder / site.name)
            else:
                own = standing_in(host.model, site)
                if f"{site.module}.q_norm.weight" not in trained:  # refitted without
                    own.q_norm = own.k_norm = None
                parts[site.name] = keep_groups(own, torch.arange(counts[site.name]))
        return Replacement(host, parts, trained, layers, counts.get(TOKENS))


def _scaled(gate: Float[Tensor, ""]) -> Callable[..., Any]:
    """A forward hook that scales what a sublayer writes."""
    def hook(_module, _inputs, output):
        return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate
    return hook


def from_noise(
    host: Host, features: int, seed: int, attention: str = "refit", skip: int = 0, basis: str = "features",
    given: Mapping[str, Transcoder] | None = None,
) -> Replacement:
    """A replacement with random transcoders (skip: rank of their linear skips) or, with basis "neurons" or "layers", the host's own neurons;
    and, unless attention is "kept", random attention layers. What is the host's own is frozen. basis "layers": whole layers are nodes. given:
    transcoders in the place of random ones, by site name."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, nn.Module] = {}
    for site in host.sites:
        if site.kind == "mlp" and basis != "features":
            parts[site.name] = Neurons.of(host.model, site).requires_grad_(False)
        elif site.kind == "mlp":
            parts[site.name] = given[site.name] if given else Transcoder(features, site.d_in, site.d_out, generator, skip)
        else:
            own = standing_in(host.model, site)
            parts[site.name] = own.requires_grad_(False) if attention == "kept" else refreshed(own, generator, norms=basis != "features")
    return Replacement(host, parts, layers=range(host.config.num_hidden_layers) if basis == "layers" else None)
