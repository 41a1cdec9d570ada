"""Compile: a circuit becomes an ordinary dense checkpoint of a stock Hugging Face class.

A ReLU transcoder *is* a stock MLP (a direction of a linear skip is two units of it), so nothing is approximated:

    target     class               up_proj          gate_proj       down_proj
    arcee      ArceeForCausalLM    w_enc, b_enc     -               w_dec', b_dec
    llama      LlamaForCausalLM    0, 1             w_enc, b_enc    w_dec', b_dec     (1.5x the MLP parameters, runs more widely)

Kept KV groups are the rows left in q, k, v and the columns left in o. Both classes have one width for all layers:
narrower layers are padded with zeros, which is exact. Parity (max |logit difference| between the compiled model and the
running circuit) is measured on real rows and proves it; the reload gate then loads the folder in a fresh process that
cannot run custom code.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from graphs.architectures import sites
from graphs.attention import groups, projection
from graphs.batches import Batch
from graphs.host import Host
from graphs.replace import Replacement
from graphs.transcoder import Transcoder, of_dictionary

Target = Literal["arcee", "llama"]


def legal_groups(config) -> tuple[int, ...]:
    """KV group counts that the compiled classes accept (hidden size % attention heads == 0), smallest first."""
    repeat = config.num_attention_heads // config.num_key_value_heads
    return tuple(g for g in range(1, config.num_key_value_heads + 1) if config.hidden_size % (g * repeat) == 0)


def compile_circuit(circuit: Replacement, target: Target = "arcee") -> Host:
    """The dense stock model that computes what `circuit` computes. Raises ValueError where a width has no legal home."""
    source = circuit.model.config
    mlps = {name: of_dictionary(part.dictionary()) for name, part in circuit.transcoders().items()}
    width = max(part.features for part in mlps.values())
    needed = max(count for name, count in circuit.node_counts().items() if name.endswith("attention"))
    kv = min((g for g in legal_groups(source) if g >= needed), default=None)
    if kv is None:
        raise ValueError(f"{needed} KV groups fit no head count that divides hidden size {source.hidden_size}: keep more or fewer heads")
    model = _empty(source, target, kv, width)
    state = {name: value for name, value in circuit.model.state_dict().items() if ".mlp." not in name and ".self_attn." not in name}
    for site in circuit.sites:
        state |= _mlp(mlps[site.name], site.module, width, target) if site.kind == "mlp" else _attention(circuit.part(site), site.module, kv)
    model.load_state_dict(state, strict=True)
    model.eval()
    return Host(model, circuit.tokenizer, sites(model))


def _empty(source, target: Target, kv: int, width: int):
    from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

    config_class, model_class = (ArceeConfig, ArceeForCausalLM) if target == "arcee" else (LlamaConfig, LlamaForCausalLM)
    repeat = source.num_attention_heads // source.num_key_value_heads
    carried = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
               "attention_bias", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
    config = config_class(
        **{name: copy.deepcopy(getattr(source, name)) for name in carried}, hidden_act="relu", mlp_bias=True, intermediate_size=width,
        num_attention_heads=kv * repeat, num_key_value_heads=kv, head_dim=source.head_dim)
    return model_class._from_config(config, dtype=torch.float32)


def _mlp(part: Transcoder, path: str, width: int, target: Target) -> dict[str, torch.Tensor]:
    encoder, bias = _padded(part.w_enc.detach(), width, 0), _padded(part.b_enc.detach(), width, 0)
    weights = {"down_proj.weight": _padded(part.w_dec.detach(), width, 0).T.contiguous(), "down_proj.bias": part.b_dec.detach()}
    if target == "arcee":
        weights |= {"up_proj.weight": encoder, "up_proj.bias": bias}
    else:
        weights |= {"gate_proj.weight": encoder, "gate_proj.bias": bias}
        weights |= {"up_proj.weight": torch.zeros_like(encoder), "up_proj.bias": torch.ones(width)}
    return {f"{path}.{name}": value for name, value in weights.items()}


def _attention(part: nn.Module, path: str, kv: int) -> dict[str, torch.Tensor]:
    weights, ratio = {}, kv / groups(part)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = projection(part, name)
        rows = round(linear.out_features * ratio)
        weights[f"{path}.{name}.weight"] = _padded(linear.weight.detach(), rows, 0)
        if linear.bias is not None:
            weights[f"{path}.{name}.bias"] = _padded(linear.bias.detach(), rows, 0)
    out = projection(part, "o_proj")
    weights[f"{path}.o_proj.weight"] = _padded(out.weight.detach(), round(out.in_features * ratio), 1)
    if out.bias is not None:
        weights[f"{path}.o_proj.bias"] = out.bias.detach()
    return weights


def _padded(value: torch.Tensor, size: int, axis: int) -> torch.Tensor:
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
        raise ValueError(f"reload gate: a fresh process cannot load {folder}: {reason}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    with torch.no_grad():
        here = host.model(input_ids=torch.tensor([ids])).logits[0, -1]
    difference = float((here - torch.tensor(answer["logits"])).abs().max())
    if difference > 1e-4:
        raise ValueError(f"reload gate: {folder} answers differently in a fresh process (logits differ by {difference:.2g})")
    return {"max_abs_logit_diff": difference, "completion": answer["completion"]}
