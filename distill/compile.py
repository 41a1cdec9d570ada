"""Compile: a circuit becomes an ordinary dense checkpoint of a stock Hugging Face class.

A ReLU transcoder *is* a stock MLP (a direction of a linear skip is two units of it), so nothing is approximated:

    target     class               up_proj          gate_proj       down_proj
    arcee      ArceeForCausalLM    w_enc, b_enc     -               w_dec', b_dec
    llama      LlamaForCausalLM    0, 1             w_enc, b_enc    w_dec', b_dec     (1.5x the MLP parameters, runs more widely)
    own        the source's        w_enc, b_enc     (0, 1: SmolLM3) w_dec', b_dec     with its activation set to relu

The neuron basis compiles into the source's own class as it is, with fewer neurons (`own`, its only target); the coarse one too, with
all neurons and fewer layers.
Sources without a home for biases move: Mistral, Qwen2 and Qwen3 become Arcee or Llama (Qwen3's norms of queries and keys are not
refitted). `auto` takes Arcee where the source can move there, else the source's own class. Kept KV groups are the rows left in
q, k, v and the columns left in o where the class lets head counts shrink at a fixed head width; elsewhere dropped heads are zeros.
A class has one width for all layers: narrower layers are padded with zeros, which is exact. Parity (max |logit difference|
between the compiled model and the running circuit) is measured on real rows and proves it; the reload gate then loads
the folder in a fresh process that cannot run custom code.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graphs.architectures import FUSED, LLAMA_VALUES, Site, architecture, heads, linear, sites
from graphs.attention import Attention, groups, projection, width
from graphs.batches import Batch
from graphs.host import Host
from graphs.neurons import Neurons
from graphs.replace import Replacement
from graphs.transcoder import of_dictionary

Target = Literal["auto", "arcee", "llama", "own"]
LLAMA_LIKE = ("LlamaForCausalLM", "ArceeForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Sources that compute what Arcee and Llama compute, once their MLPs are transcoders."""
WIDTHS = {"GPT2LMHeadModel": "n_inner", "OPTForCausalLM": "ffn_dim"}
"""What a class calls the width of its MLPs, where not intermediate_size."""


def home(model: PreTrainedModel, target: Target, neurons: bool = False, kept: bool = False) -> str:
    """The class that a model's circuits compile into. neurons: of the neuron basis; kept: with the model's own attention. Raises ValueError,
    with the reason and the way out, where there is none."""
    source, config = type(model).__name__, model.config
    if architecture(model).post is not None:
        raise ValueError(f"{source}: a norm scales what each sublayer writes, and no stock class holds a transcoder's output behind it; "
                         "its graph can be read (distill view, distill find), not compiled")
    if neurons:
        if target not in ("auto", "own"):
            raise ValueError(f"--target {target}: neurons keep their activation, and live in the model's own class only; give --target own")
        return source
    if target == "auto":
        target = "arcee" if source in LLAMA_LIKE else "own"
    if target == "own":
        if source in LLAMA_LIKE and source not in ("LlamaForCausalLM", "ArceeForCausalLM"):
            raise ValueError(f"--target own: the MLPs of {source} have no biases, and a transcoder does; give --target arcee or llama")
        if not getattr(config, "use_bias", True) or not getattr(config, "enable_bias", True):
            raise ValueError(f"--target own: this {source} was made without biases, and a transcoder has some; use a checkpoint with biases")
        return source
    if source not in LLAMA_LIKE:
        raise ValueError(f"--target {target}: {source} does not compute what {target} computes; give --target own")
    if windowed(config):
        raise ValueError(f"--target {target}: this {source} attends in windows of {config.sliding_window} tokens, shorter than its context, and "
                         f"{target} does not; give --basis neurons, or set sliding_window to null and max_position_embeddings to the window in its "
                         "config.json")
    if kept and normed(model):
        raise ValueError(f"--attention kept: {source} norms its queries and keys, and {target} does not; give --attention refit")
    return "ArceeForCausalLM" if target == "arcee" else "LlamaForCausalLM"


def normed(model: PreTrainedModel) -> bool:
    """Whether attention norms its queries and keys (Qwen3), which Arcee and Llama do not."""
    return getattr(model.get_submodule(sites(model)[0].module), "q_norm", None) is not None


def windowed(config: Any) -> bool:
    """Whether some layer looks back on fewer tokens than the context holds."""
    window = getattr(config, "sliding_window", None)
    local = getattr(config, "use_sliding_window", True) and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return window is not None and local and window < config.max_position_embeddings


def legal_groups(model: PreTrainedModel, target: Target = "auto", neurons: bool = False) -> tuple[int, ...]:
    """KV group counts that the compiled class can store, smallest first: those with hidden size % attention heads == 0 in Arcee and
    Llama, which have a head width of their own; all of them in classes that derive it from the head count."""
    config, attention = model.config, model.get_submodule(sites(model)[0].module)
    whole = attention.whole if isinstance(attention, Attention) else heads(model, attention)[0]
    if home(model, target, neurons) not in ("ArceeForCausalLM", "LlamaForCausalLM"):
        return (whole,)
    repeat = config.num_attention_heads // whole
    return tuple(g for g in range(1, whole + 1) if config.hidden_size % (g * repeat) == 0)


def shaped(circuit: Replacement, target: Target = "auto") -> Host:
    """An empty stock model of the class and shapes that hold `circuit`. Raises ValueError where a width has no legal home."""
    neurons = any(isinstance(part, Neurons) for part in circuit.transcoders().values())
    wide = max(part.features + 2 * part.skip for part in circuit.transcoders().values())
    needed = max(count for site, count in circuit.node_counts().items() if site.endswith("attention"))
    kv = min((g for g in legal_groups(circuit.model, target, neurons) if g >= needed), default=None)
    if kv is None:
        raise ValueError(f"{needed} KV groups fit no head count that divides the width {circuit.model.config.hidden_size}: keep more or fewer heads")
    model = _empty(circuit, home(circuit.model, target, neurons, kept=True), kv, wide, neurons)
    model.eval()
    return Host(model, circuit.tokenizer, sites(model))


def compile_circuit(circuit: Replacement, target: Target = "auto") -> Host:
    """The dense stock model that computes what `circuit` computes. Raises ValueError where a width has no legal home."""
    made = shaped(circuit, target)
    replaced = tuple(f"{path}." for site in circuit.sites for path in (site.module, site.writes))
    state = {key: value for key, value in circuit.model.state_dict().items() if not key.startswith(replaced)}
    for site, there in zip(circuit.sites, made.sites, strict=True):
        part = circuit.part(site)
        state |= _attention(part, made.model, there.module) if isinstance(part, Attention) else _mlp(part, made.model, there)
    made.model.load_state_dict(state, strict=True)
    made.model.generation_config = copy.deepcopy(circuit.model.generation_config)
    return made


def _empty(circuit: Replacement, name: str, kv: int, wide: int, neurons: bool) -> Any:
    """A model of the class with the source's shapes, but for heads and the width of MLPs."""
    import transformers

    source, model_class = circuit.model.config, getattr(transformers, name)
    one = next(iter(circuit.attention().values()))
    shapes: dict[str, Any] = {WIDTHS.get(name, "intermediate_size"): wide}
    if name in ("ArceeForCausalLM", "LlamaForCausalLM"):
        shapes |= {"num_attention_heads": kv * one.num_key_value_groups, "num_key_value_heads": kv, "head_dim": width(one)}
    if not neurons:
        shapes[architecture(circuit.model).activation] = "relu"
        if hasattr(source, "mlp_bias") or name in ("ArceeForCausalLM", "LlamaForCausalLM"):
            shapes["mlp_bias"] = True
    if name == type(circuit.model).__name__:
        config = copy.deepcopy(source)
        config.update(shapes)
    else:
        biased = any(linear.bias is not None for linear in one.children() if isinstance(linear, nn.Linear))
        carried = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                   "rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
        config = model_class.config_class(**{key: copy.deepcopy(getattr(source, key)) for key in carried}, **shapes, attention_bias=biased)
    return model_class._from_config(config, dtype=torch.float32)


def _mlp(part: Any, model: Any, there: Site) -> dict[str, Tensor]:
    """A transcoder as ReLU units, or neurons as they are, as the MLP at a site of `model`."""
    row, part = architecture(model), part if isinstance(part, Neurons) else of_dictionary(part.dictionary())
    *gate, up, down = (f"{row.layers}.{there.layer}.{name}" for name in row.neurons)
    wide = linear(model.get_submodule(up))[0].shape[0]
    encoder, bias = _padded(part.w_enc.detach(), wide, 0), _padded(part.b_enc.detach(), wide, 0)
    held = {down: (_padded(part.w_dec.detach(), wide, 0).T.contiguous(), part.b_dec.detach()), up: (encoder, bias)}
    if isinstance(part, Neurons) and part.w_gate is not None and part.b_gate is not None:
        held[gate[0]] = (_padded(part.w_gate.detach(), wide, 0), _padded(part.b_gate.detach(), wide, 0))
    elif gate:
        held |= {gate[0]: (encoder, bias), up: (torch.zeros_like(encoder), torch.ones(wide))}
    return {key: value for path, (weight, shift) in held.items() for key, value in _as_stored(model, path, weight, shift).items()}


def _attention(part: Attention, model: Any, path: str) -> dict[str, Tensor]:
    """Our attention as a layer of `model`."""
    row, ratio = architecture(model), heads(model, model.get_submodule(path))[0] / groups(part)
    sides = []
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = projection(part, name)
        rows = round(linear.out_features * ratio)
        sides.append((_padded(linear.weight.detach(), rows, 0), None if linear.bias is None else _padded(linear.bias.detach(), rows, 0)))
    out = projection(part, "o_proj")
    held = {row.output: (_padded(out.weight.detach(), round(out.in_features * ratio), 1), None if out.bias is None else out.bias.detach())}
    if row.values == LLAMA_VALUES:
        held |= dict(zip(("q_proj", "k_proj", "v_proj"), sides, strict=True))
    else:
        held[row.values] = (_together([weight for weight, _ in sides], row.values, width(part)),
                            None if sides[0][1] is None else _together([bias for _, bias in sides if bias is not None], row.values, width(part)))
    state = {f"{path}.{key}": value for key, value in part.state_dict().items() if key.startswith(("q_norm", "k_norm"))}
    return state | {key: value for name, (weight, shift) in held.items() for key, value in _as_stored(model, f"{path}.{name}", weight, shift).items()}


def _together(sides: list[Tensor], kind: str, wide: int) -> Tensor:
    """Queries, keys and values as one weight or bias: one after the other, or head by head."""
    if kind == FUSED:
        return torch.cat(sides)
    return torch.stack([side.reshape(-1, wide, *side.shape[1:]) for side in sides], 1).flatten(0, 2)


def _as_stored(model: Any, path: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """A linear map under its name, as the class stores it (GPT-2 transposed); a bias that it has and we have not is zero."""
    module = model.get_submodule(path)
    found = {f"{path}.weight": weight if isinstance(module, nn.Linear) else weight.T.contiguous()}
    if module.bias is not None:
        found[f"{path}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    elif bias is not None and bool(bias.any()):
        raise ValueError(f"{type(model).__name__} has no bias at {path}; this is a defect, please report it")
    return found


def _padded(value: Tensor, size: int, axis: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], axis).contiguous()


@torch.no_grad()
def parity(circuit: Replacement, compiled: Host, batch: Batch) -> float:
    """Max |logit difference| between the running circuit and the compiled model over real tokens, float32."""
    difference = circuit(batch.ids) - compiled.model(input_ids=batch.ids).logits
    return float(difference[batch.real].abs().max())


RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, probe = sys.argv[1], json.load(open(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor([probe["ids"]])).logits[0, -1]
text = tokenizer(probe["prompt"], return_tensors="pt")
out = model.generate(text["input_ids"], attention_mask=text["attention_mask"], max_new_tokens=probe["new_tokens"], do_sample=False)
print(json.dumps({"logits": logits.tolist(), "completion": tokenizer.decode(out[0, text["input_ids"].shape[1]:], skip_special_tokens=True)}))
"""
"""What the fresh process runs: transformers alone, no code of this project."""


def reload_gate(folder: Path, host: Host, prompt: str, ids: list[int], scratch: Path, new_tokens: int = 64) -> dict:
    """Load `folder` in a fresh process without custom code, match logits, generate. Raises ValueError where it does not.

    Returns {"max_abs_logit_diff", "completion"}; the bound is 1e-4 in float32 (the folder is compared with itself as
    loaded here, so the dtype it was stored in does not enter).
    """
    probe = scratch / "probe.json"
    probe.write_text(json.dumps({"ids": ids, "prompt": prompt, "new_tokens": new_tokens}))
    done = subprocess.run([sys.executable, "-I", "-c", RELOAD, str(folder), str(probe)], capture_output=True, text=True, timeout=300)
    probe.unlink()
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise ValueError(f"reload gate: a fresh process cannot load {folder} ({reason}); see whether transformers loads it by itself")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    with torch.no_grad():
        here = host.model(input_ids=torch.tensor([ids])).logits[0, -1]
    difference = float((here - torch.tensor(answer["logits"])).abs().max())
    if not difference <= 1e-4:
        raise ValueError(f"reload gate: {folder} answers differently in a fresh process (logits differ by {difference:.2g}); this is a defect, "
                         "please report it")
    return {"max_abs_logit_diff": difference, "completion": answer["completion"]}
