"""A prompt graph in the JSON layout that circuit-tracer writes and Neuronpedia reads (circuit-tracer, `frontend/graph_models.py`).

Their nodes are transcoder features, errors, embeddings and logits; attention components go in as features of their layer with
numbers above the layer's transcoder, named in `clerp`. Output biases and learned positions have no kind there and are left out.
"""

from __future__ import annotations

from typing import Any

from graphs.prompt_graph import PromptGraph, PromptNode

SCHEMA: dict[str, dict[str, type | tuple[type, ...]]] = {
    "metadata": {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str, "node_threshold": float,
                 "schema_version": int},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float, "is_target_logit": bool,
              "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str, "influence": (float, type(None)),
              "activation": (float, type(None))},
    "links": {"source": str, "target": str, "weight": float},
}
"""Fields and types of each part."""


def pairing(x: int, y: int) -> int:
    """Cantor's pairing of layer and feature, the number their pages look features up by."""
    return (x + y) * (x + y + 1) // 2 + y


def export(graph: PromptGraph, ids: list[int], prompt: str, slug: str, scan: str, layers: int, features: int, node_share: float) -> dict[str, Any]:
    """The graph as their JSON. features: transcoder features a layer (component numbers start there); scan: what the dictionaries are called."""
    ends = {one.node: rank for rank, one in enumerate(one for one in graph.nodes if one.kind == "logit")}
    known = {place: _node(one, ids, layers, features, graph, ends.get(one.node, 0)) for place, one in enumerate(graph.nodes)
             if one.kind not in ("bias", "position")}
    edges = zip(graph.src.tolist(), graph.dst.tolist(), graph.weight.tolist(), strict=True)
    return {
        "metadata": {"slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": list(graph.tokens), "prompt": prompt,
                     "node_threshold": node_share, "schema_version": 1},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(known.values()),
        "links": [{"source": known[s]["node_id"], "target": known[t]["node_id"], "weight": w} for s, t, w in edges if s in known and t in known],
    }


def _node(one: PromptNode, ids: list[int], layers: int, features: int, graph: PromptGraph, rank: int) -> dict[str, Any]:
    layer, number, kind, slot, end = one.name.split(".")[0][1:], 0, "cross layer transcoder", "0", False
    match one.kind:
        case "feature":
            number = int(one.name.split(".F")[1])
        case "attention":
            number = features + one.node
        case "error":
            number, slot = -1 if one.name.endswith("mlp.error") else -2, str(one.token)
            kind = "mlp reconstruction error" if number == -1 else "attention reconstruction error"
        case "token":
            layer, number, kind, slot = "E", ids[one.token], "embedding", str(one.token)
        case "logit":
            layer, number, kind, end = str(layers + 1), graph.outcome.vocabulary[rank], "logit", rank == 0
    where = "L" if one.kind == "logit" else layer
    shown = pairing(int(layer), number) if one.kind in ("feature", "attention") else one.token if one.kind == "token" else number
    chance = graph.outcome.weights[rank] if one.kind == "logit" else 0.0
    said = f"Output {one.name.removeprefix('logit ')} (p={chance:.3f})" if one.kind == "logit" else one.name if one.kind == "attention" else ""
    return {"node_id": f"{layer}_{number}_{one.token}", "feature": shown, "layer": layer, "ctx_idx": one.token, "feature_type": kind,
            "token_prob": chance, "is_target_logit": end, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{where}_{number}-{slot}",
            "clerp": said, "influence": one.influence, "activation": one.activation if one.kind in ("feature", "attention") else None}


def validate(made: dict[str, Any]) -> None:
    """Raise ValueError where a part misses a field, has one too many or of another type, or a link has no node."""
    for part, fields in SCHEMA.items():
        for entry in made[part] if isinstance(made[part], list) else [made[part]]:
            if set(entry) != set(fields):
                raise ValueError(f"{part}: fields {sorted(set(entry) ^ set(fields))} are missing or unknown; correct the graph")
            for name, kind in fields.items():
                if not isinstance(entry[name], kind):
                    raise ValueError(f"{part}.{name}: {type(entry[name]).__name__} where {kind} belongs; correct the graph")
    names = [node["node_id"] for node in made["nodes"]]
    if len(set(names)) != len(names):
        raise ValueError("nodes: two have the same node_id; correct the graph")
    loose = {end for link in made["links"] for end in (link["source"], link["target"])} - set(names)
    if loose:
        raise ValueError(f"links: {sorted(loose)[0]} is no node; correct the graph")
