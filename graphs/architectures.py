"""Architectures: where a stock causal language model keeps what the graph must know, one table row a class.

The only file that knows Hugging Face module names. A row says where the layers are, which norm each sublayer reads
through, which module's output is added to the residual stream, where the value and output projections and the neurons'
weights are, and whether attention and MLP of a layer read the same stream (a parallel block). Everything else in
`graphs/` works on what this file hands out: `Site`s, norms, and the model's own nodes with the *feature axis first*.

A normalisation is linear once its scale is frozen:

    x = gain * (r - centre(r)) / scale + offset          RMSNorm: centre = 0, offset = 0; Gemma's gain is 1 + w

so a read vector on `x` is a read vector on the residual stream `r` (`Norm.pulled`), up to the token's 1 / scale.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphs.components import Components
from graphs.dictionary import Act, Dictionary, Gate, Gated, Part

LLAMA_VALUES, FUSED, INTERLEAVED = "v_proj", "c_attn", "query_key_value"


@dataclass(frozen=True)
class Architecture:
    """Module names of one class. Paths of norms, attention and MLP are relative to a layer; post: norms between a sublayer and
    the stream (attention's, the MLP's); positions: the module of learned positions."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    positions: str | None = None
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    values: str = LLAMA_VALUES
    output: str = "o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_output: str = "mlp"
    neurons: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    activation: str = "hidden_act"
    post: tuple[str, str] | None = None
    unit_gain: bool = False
    parallel: bool | str = False
    """Whether attention and MLP of a layer both read what entered the layer; a string names the config's switch."""


_GEMMA = Architecture(mlp_norm="pre_feedforward_layernorm", mlp_output="post_feedforward_layernorm", activation="hidden_activation",
                      post=("post_attention_layernorm", "post_feedforward_layernorm"), unit_gain=True)
_GPT2 = Architecture("transformer.h", "transformer.ln_f", "transformer.wpe", "attn", "ln_1", FUSED, "c_proj", "ln_2",
                     neurons=("mlp.c_fc", "mlp.c_proj"), activation="activation_function")
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "ArceeForCausalLM": Architecture(neurons=("mlp.up_proj", "mlp.down_proj")),
    "MistralForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(),
    "SmolLM3ForCausalLM": Architecture(),
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoForCausalLM": Architecture("transformer.h", "transformer.ln_f", "transformer.wpe", "attn.attention", "ln_1", output="out_proj",
                                      mlp_norm="ln_2", neurons=("mlp.c_fc", "mlp.c_proj"), activation="activation_function"),
    "GPTNeoXForCausalLM": Architecture("gpt_neox.layers", "gpt_neox.final_layer_norm", None, "attention", "input_layernorm", INTERLEAVED, "dense",
                                       neurons=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), parallel="use_parallel_residual"),
    "OPTForCausalLM": Architecture("model.decoder.layers", "model.decoder.final_layer_norm", "model.decoder.embed_positions", "self_attn",
                                   "self_attn_layer_norm", output="out_proj", mlp_norm="final_layer_norm", mlp="fc1", mlp_output="fc2",
                                   neurons=("fc1", "fc2"), activation="activation_function"),
    "PhiForCausalLM": Architecture(final_norm="model.final_layernorm", output="dense", mlp_norm="input_layernorm",
                                   neurons=("mlp.fc1", "mlp.fc2"), parallel=True),
    "Starcoder2ForCausalLM": Architecture(neurons=("mlp.c_fc", "mlp.c_proj")),
}
"""Classes whose graph can be built."""
BY_LAYER = ("layer_types", "attention_layers", "no_rope_layers")
"""What a config says of each layer, one entry a layer."""


@dataclass(frozen=True)
class Site:
    """One sublayer. name: "L2.mlp" or "L2.attention"; module: its path; norm: what it reads through; writes: the module whose
    output is added to the stream; depths count what has been added to the stream before it reads and once it has written."""

    name: str
    layer: int
    kind: Literal["attention", "mlp"]
    module: str
    norm: str
    writes: str
    d_in: int
    d_out: int
    reads_at: int
    writes_at: int


def architecture(model: PreTrainedModel) -> Architecture:
    """The model's row. Raises ValueError, naming what is supported, where there is none or its config is a variant without one."""
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} is not supported yet; choose from {', '.join(ARCHITECTURES)}")
    config = model.config
    projected = getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size
    if projected or getattr(config, "do_layer_norm_before", True) is False or getattr(config, "_remove_final_layer_norm", False):
        raise ValueError(f"architecture {name} with norms after the sublayer, none at the end or projected embeddings is not supported: use "
                         "another checkpoint")
    if getattr(config, "qk_layernorm", False):
        raise ValueError(f"architecture {name} with qk_layernorm is not supported: use a checkpoint without")
    return ARCHITECTURES[name]


def sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The sublayers in order of depth. Raises ValueError as `architecture` does."""
    row, config = architecture(model), model.config
    parallel = getattr(config, row.parallel) if isinstance(row.parallel, str) else row.parallel
    width, found = config.hidden_size, []
    for layer in range(config.num_hidden_layers):
        base, depth = f"{row.layers}.{layer}", 2 * layer
        attended = f"{base}.{row.post[0]}" if row.post else f"{base}.{row.attention}"
        found += [
            Site(f"L{layer}.attention", layer, "attention", f"{base}.{row.attention}", f"{base}.{row.attention_norm}", attended,
                 width, width, depth, depth + 1),
            Site(f"L{layer}.mlp", layer, "mlp", f"{base}.{row.mlp}", f"{base}.{row.mlp_norm}", f"{base}.{row.mlp_output}",
                 width, width, depth if parallel else depth + 1, depth + 2)]
    return tuple(found)


@dataclass(frozen=True)
class Norm:
    """A normalisation as a linear map with a frozen scale."""

    gain: Float[Tensor, "d"]
    offset: Float[Tensor, "d"]
    centred: bool
    eps: float

    def inverse(self, stream: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """1 / scale at each token."""
        inner = stream - stream.mean(-1, keepdim=True) if self.centred else stream
        return torch.rsqrt(inner.square().mean(-1) + self.eps)

    def frozen(self, stream: Float[Tensor, "*batch d"], inverse: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        """What the norm puts out with the given 1 / scale."""
        inner = stream - stream.mean(-1, keepdim=True) if self.centred else stream
        return self.gain * inner * inverse[..., None] + self.offset

    def pulled(self, read: Float[Tensor, "*node d"]) -> Float[Tensor, "*node d"]:
        """Read vectors on the norm's output as read vectors on the stream: read . x = pulled . r / scale + read . offset."""
        scaled = read * self.gain
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


def norm(model: PreTrainedModel, path: str) -> Norm:
    """The norm at `path`."""
    return _norm_of(model, model.get_submodule(path))


def _norm_of(model: PreTrainedModel, module: nn.Module) -> Norm:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    gain = torch.ones(model.config.hidden_size) if weight is None else weight.detach()
    gain = gain + 1 if architecture(model).unit_gain else gain
    eps: Any = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(gain, torch.zeros_like(gain) if bias is None else bias.detach(), isinstance(module, nn.LayerNorm), float(eps))


def post_norm(model: PreTrainedModel, site: Site) -> Norm | None:
    """The norm between the sublayer and the stream, where there is one."""
    return norm(model, site.writes) if architecture(model).post else None


def linear(module: nn.Module) -> tuple[Float[Tensor, "out inside"], Float[Tensor, "out"] | None]:
    """Weight, output axis first, and bias (None where there is none) of a Linear or of GPT-2's transposed Conv1D."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    bias = getattr(module, "bias", None)
    return weight if isinstance(module, nn.Linear) else weight.T, None if bias is None else bias.detach()


def or_zeros(bias: Float[Tensor, "*axes"] | None, weight: Float[Tensor, "*axes inside"]) -> Float[Tensor, "*axes"]:
    """A bias, or zeros in its place."""
    return weight.new_zeros(weight.shape[:-1]) if bias is None else bias


def heads(model: PreTrainedModel, attention: nn.Module) -> tuple[int, int]:
    """(KV groups, head width) of an attention module; one that was pruned has fewer groups than the config says."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not hasattr(attention, LLAMA_VALUES):
        return config.num_attention_heads, width
    return linear(attention.get_submodule(LLAMA_VALUES))[0].shape[0] // width, width


def projected(
    model: PreTrainedModel, attention: nn.Module, which: int
) -> tuple[Float[Tensor, "group width d_in"], Float[Tensor, "group width"] | None]:
    """Weight and bias of an attention module's queries (0; a group is then a head), keys (1) or values (2), however the class stores them."""
    row, (groups, width) = architecture(model), heads(model, attention)
    if hasattr(attention, LLAMA_VALUES):
        weight, bias = linear(attention.get_submodule(("q_proj", "k_proj", LLAMA_VALUES)[which]))
    else:
        weight, bias = linear(attention.get_submodule(row.values))
        if row.values == FUSED:
            weight, bias = weight.chunk(3)[which], None if bias is None else bias.chunk(3)[which]
        else:
            weight = weight.reshape(groups, 3, width, -1)[:, which].flatten(0, 1)
            bias = None if bias is None else bias.reshape(groups, 3, width)[:, which].flatten()
    return weight.reshape(-1, width, weight.shape[1]), None if bias is None else bias.reshape(-1, width)


def output_projection(model: PreTrainedModel, attention: nn.Module) -> tuple[Float[Tensor, "d_out d_heads"], Float[Tensor, "d_out"] | None]:
    """Weight and bias of an attention module's output projection."""
    return linear(attention.get_submodule(output_name(model, attention)))


def output_name(model: PreTrainedModel, attention: nn.Module) -> str:
    """What an attention module calls its output projection: the class's name, or ours in a module that stands in for it."""
    name = architecture(model).output
    return name if hasattr(attention, name) else "o_proj"


def attention_window(model: PreTrainedModel, layer: int) -> int | None:
    """How many tokens the attention of a layer looks back on, itself among them; None where it sees all."""
    config: Any = model.config
    if hasattr(config, "window_size"):  # GPT-Neo
        return config.window_size if config.attention_layers[layer] == "local" else None
    kinds = getattr(config, "layer_types", None)
    if (kinds and kinds[layer] == "full_attention") or not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


@dataclass(frozen=True)
class Scores:
    """What an attention layer's scores are made of: scale * q . k, each side normed first where the class does. rotates: whether
    positions turn both sides."""

    query: Float[Tensor, "head inside d_in"]
    query_bias: Float[Tensor, "head inside"] | None
    query_norm: Norm | None
    key: Float[Tensor, "group inside d_in"]
    key_bias: Float[Tensor, "group inside"] | None
    key_norm: Norm | None
    scale: float
    rotates: bool


def attention_scores(model: PreTrainedModel, attention: nn.Module) -> Scores:
    """The queries and keys of an attention module. Raises ValueError where scores are bent by a soft cap."""
    if getattr(attention, "attn_logit_softcapping", None):
        raise ValueError(f"{type(model).__name__} bends its attention scores with a soft cap, so they are no sum over pairs of nodes; its heads can "
                         "be read by their components (L1.H2.C3)")
    sides = [(*projected(model, attention, which), _inner_norm(model, attention, name)) for which, name in ((0, "q_norm"), (1, "k_norm"))]
    return Scores(*sides[0], *sides[1], float(getattr(attention, "scaling", 1.0)), bool(getattr(attention, "use_rope", True)))


def rotary(model: PreTrainedModel) -> tuple[Float[Tensor, "pair"], float] | None:
    """By how much each pair of dimensions of queries and keys turns a place (radians), and what both are scaled by; None without rotary
    positions. Raises ValueError where angles depend on how long the text is."""
    for module in model.modules():
        if isinstance(turns := getattr(module, "inv_freq", None), Tensor):
            kind = getattr(module, "rope_type", "default")
            if kind in ("dynamic", "longrope"):
                raise ValueError(f"rotary positions of the type {kind} depend on how long the text is: set rope_type to default in config.json")
            return turns.detach(), float(getattr(module, "attention_scaling", 1.0))
    return None


def _inner_norm(model: PreTrainedModel, attention: nn.Module, name: str) -> Norm | None:
    module: Any = getattr(attention, name, None)
    return None if module is None else _norm_of(model, module)


def attention_components(model: PreTrainedModel, site: Site, attention: nn.Module | None = None) -> Components:
    """The value dimensions of the attention layer at `site` as components, without error: the model's own, or those of a module
    that stands in for it. A post-norm's gain is folded into the write vectors.

    Raises ValueError where that norm centres or shifts what it scales: no supported class does.
    """
    module = attention or model.get_submodule(site.module)
    weight, bias = projected(model, module, 2)
    out, constant = output_projection(model, module)
    write, post = out.T.reshape(-1, weight.shape[1], out.shape[0]), post_norm(model, site)
    if post is not None:
        if post.centred or bool(post.offset.any()) or constant is not None:
            raise ValueError("a post-norm that centres or shifts its input has no components: use heads instead")
        write = write * post.gain
    return Components(weight, or_zeros(bias, weight), write, or_zeros(constant, out))


def neurons(model: PreTrainedModel, site: Site) -> Dictionary:
    """The neuron basis: the own neurons of the MLP at `site` as a dictionary, without error but behind a post-norm; in a gated MLP
    `read` is the up projection."""
    row = architecture(model)
    whole = [linear(model.get_submodule(f"{row.layers}.{site.layer}.{name}")) for name in row.neurons]
    (read, bias), (out, constant) = whole[-2], whole[-1]
    activation = getattr(model.config, row.activation)
    gate: Gate = Gated(activation, whole[0][0], or_zeros(whole[0][1], whole[0][0])) if len(whole) == 3 else Act(activation)
    return Dictionary((Part(read, or_zeros(bias, read), out.T, gate),), or_zeros(constant, out))


def mlp_biased(model: PreTrainedModel, site: Site) -> bool:
    """Whether the MLP at `site` has biases."""
    row = architecture(model)
    return any(linear(model.get_submodule(f"{row.layers}.{site.layer}.{name}"))[1] is not None for name in row.neurons)


def embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The tables at both ends: tokens, learned positions where there are any, and the unembedding."""
    row, ends = architecture(model), [model.get_input_embeddings(), model.get_output_embeddings()]
    return ends if row.positions is None else [*ends, model.get_submodule(row.positions)]


def run_mlp(model: PreTrainedModel, site: Site, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """What the MLP at `site` makes of `x`, in a class without post-norms."""
    module: Any = model.get_submodule(site.module)
    if site.writes == site.module:
        return module(x)
    layer: Any = model.get_submodule(site.module.rpartition(".")[0])  # OPT's MLP is three modules of its layer
    return model.get_submodule(site.writes)(layer.activation_fn(module(x)))


def writer(model: PreTrainedModel, site: Site) -> nn.Module:
    """The projection that the sublayer at `site` writes through: it reads what the neurons, or the heads side by side, put out."""
    if site.kind == "attention":
        return model.get_submodule(site.module).get_submodule(output_name(model, model.get_submodule(site.module)))
    row = architecture(model)
    return model.get_submodule(f"{row.layers}.{site.layer}.{row.neurons[-1]}")


def readers(model: PreTrainedModel, site: Site) -> list[nn.Module]:
    """The projections that the neurons of the MLP at `site` read through: one, or gate and up."""
    row = architecture(model)
    return [model.get_submodule(f"{row.layers}.{site.layer}.{name}") for name in row.neurons[:-1]]


def install(model: PreTrainedModel, site: Site, part: nn.Module) -> None:
    """Put `part` in the place of the sublayer at `site`, with the same call."""
    row, (parent, _, leaf) = architecture(model), site.module.rpartition(".")
    setattr(model.get_submodule(parent), leaf, part)
    if site.kind == "mlp" and site.writes != site.module and row.post is None:  # OPT's MLP is three modules of its layer
        layer = model.get_submodule(parent)
        layer.activation_fn = nn.Identity()
        setattr(layer, site.writes.rpartition(".")[2], nn.Identity())


def shortened(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy with the kept layers only, in the order given and numbered anew."""
    small = copy.deepcopy(model)
    parent, _, name = architecture(model).layers.rpartition(".")
    layers = nn.ModuleList([small.get_submodule(f"{architecture(model).layers}.{layer}") for layer in kept])
    for place, layer in enumerate(layers):
        for module in layer.modules():
            for key in ("layer_idx", "layer_id"):
                if hasattr(module, key):
                    setattr(module, key, place)
    setattr(small.get_submodule(parent), name, layers)
    small.config.num_hidden_layers = len(kept)
    for listed in BY_LAYER:
        if getattr(small.config, listed, None):
            setattr(small.config, listed, [getattr(model.config, listed)[layer] for layer in kept])
    if hasattr(small.config, "attention_types"):  # GPT-Neo's own spelling of attention_layers
        small.config.attention_types = [[small.config.attention_layers, 1]]
    return small
