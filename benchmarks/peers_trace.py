"""One side of the race of prompt graphs (`peers.py` starts it): the graph of one prompt, each time a line comes on standard input.

    PYTHON peers_trace.py ours|circuit_tracer FOLDER JOB

FOLDER/model: a Llama; FOLDER/transcoders: layer_N.safetensors and config.yaml, which both sides read; JOB: a JSON object (`peers.Graph`). The first
answer holds what both must agree on: the logits of the next token, and how many features are active behind the first token (which
circuit-tracer leaves out). Each later one: processor seconds of the graph and its pruning, and what it holds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Traced = Callable[[], dict]
"""Makes the graph once and says what it holds."""


def ours(folder: Path, job: dict) -> tuple[dict, Traced]:
    """What `distill view --model DIR --dictionaries DIR --prompt TEXT` does; then the same with as many nodes as hold the features asked for
    (`matched`)."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from distill.config import View as Inspect
    from distill.runs import bare
    from graphs.dictionary import Dictionary
    from graphs.edges import activations
    from graphs.prompt_graph import attribute

    subject = bare(str(folder / "model"), str(folder / "transcoders"), None).subject
    ids = torch.tensor([job["ids"]])

    def graph(most: int, nodes: float, edges: float) -> dict:
        made = attribute(subject, ids, node_share=nodes, edge_share=edges, most=most)
        return {"nodes": len(made.nodes), "edges": len(made.src), "features": [one.kind for one in made.nodes].count("feature")}

    with torch.no_grad():
        found = subject.trace(ids)
        active = sum(int((activations(part, found.sites[name])[0, 1:] > 0).sum()) for name, part in subject.basis.items()
                     if isinstance(part, Dictionary))
    most = nodes_that_hold(subject, found, job["features"]) if job["features"] else 0

    def traced() -> dict:
        with torch.no_grad():
            started = time.process_time()
            made = graph(Inspect().nodes, Inspect().influence, 0.98)
            spent = time.process_time() - started
            if not most:
                return made | {"processor": spent}
            wide = graph(most, 1.0, 0.98)
            return made | {"processor": spent, "matched": time.process_time() - started - spent, "matched_nodes": wide["nodes"]}

    return {"logits": found.logits[0, -1].tolist(), "active": active}, traced


def nodes_that_hold(subject, found, features: int) -> int:
    """How many nodes, the most influential first, hold that many features: attention components are nodes too, and large ones."""
    from graphs.influence import influence, likely

    with torch.no_grad():
        flows = influence(subject, found, likely(found))
    every = [(one.flatten(), name.endswith(".mlp")) for name, one in flows.nodes.items()] + [(one, False) for one in flows.error.values()]
    feature = torch.cat([torch.full((len(one),), kind) for one, kind in every])
    held = feature[torch.cat([one for one, _ in every]).argsort(descending=True)].cumsum(0)
    return int((held < features).sum()) + 1


def circuit_tracer(folder: Path, job: dict) -> tuple[dict, Traced]:
    """`attribute` and `prune_graph` on the TransformerLens backend, the model built from its weights as `from_pretrained` would."""
    from circuit_tracer.attribution.attribute import attribute
    from circuit_tracer.graph import prune_graph
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    made = LlamaForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
    shape = made.config
    home = folder / "tokenizer"  # written anew: the file of a later transformers names a class that this one has not
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), **job["special"]).save_pretrained(home)
    config = HookedTransformerConfig(
        n_layers=shape.num_hidden_layers, d_model=shape.hidden_size, n_ctx=shape.max_position_embeddings, d_vocab=shape.vocab_size,
        d_head=shape.hidden_size // shape.num_attention_heads, n_heads=shape.num_attention_heads, d_mlp=shape.intermediate_size, act_fn="silu",
        normalization_type="RMS", positional_embedding_type="rotary", rotary_adjacent_pairs=False, final_rms=True, gated_mlp=True,
        rotary_dim=shape.hidden_size // shape.num_attention_heads, eps=shape.rms_norm_eps, original_architecture="LlamaForCausalLM",
        model_name="llama", device="cpu", dtype=torch.float32)
    model = TransformerLensReplacementModel(config, tokenizer=PreTrainedTokenizerFast.from_pretrained(home))
    model.load_and_process_state_dict(convert_llama_weights(made, config), fold_ln=False, center_writing_weights=False, center_unembed=False,
                                      fold_value_biases=False)
    files = {layer: str(folder / "transcoders" / f"layer_{layer}.safetensors") for layer in range(shape.num_hidden_layers)}
    transcoders = load_transcoder_set(files, "random", "mlp.hook_in", "mlp.hook_out", device=torch.device("cpu"), lazy_encoder=False,
                                      lazy_decoder=False)
    model._configure_replacement_model(transcoders)
    ids = torch.tensor(job["ids"])

    def traced() -> dict:
        started = time.process_time()
        graph = attribute(ids, model, max_feature_nodes=job["features"] or None, batch_size=job["batch"])
        attributed = time.process_time() - started
        kept = prune_graph(graph)
        return {"attribute": attributed, "nodes": int(kept.node_mask.sum()), "edges": int(kept.edge_mask.sum()),
                "features": len(graph.selected_features)}

    with torch.no_grad():
        logits = model(ids[None])[0, -1]
    return {"logits": logits.tolist(), "active": model.setup_attribution(ids).activation_matrix._nnz()}, traced


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answer, work = {"ours": ours, "circuit_tracer": circuit_tracer}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
    while True:
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if not sys.stdin.readline().strip():
            break
        begun = time.process_time(), time.perf_counter()
        answer = work()
        answer = {"processor": time.process_time() - begun[0], "wall": time.perf_counter() - begun[1]} | answer
