"""`distill view`: a circuit, or what one prompt does in it, as one offline HTML page to walk through.

The page fetches nothing and runs one script, allowed by its hash; every text is set as text, so what a prompt or a model
wrote can never become markup.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from distill import config
from distill.report import environment, visible
from distill.runs import Opened, inspected
from graphs.artifact import write_json, write_text
from graphs.contexts import top_contexts
from graphs.picture import Picture, of_graph, of_prompt
from graphs.prompt_graph import attribute
from graphs.tracer_format import export, validate

SHOWN = 3
"""Contexts a node on the page."""


def run(verb: config.View) -> int:
    """Write the page; print where it is."""
    if verb.tracer is not None and verb.prompt is None:
        raise ValueError("--tracer writes the graph of a prompt: give --prompt too")
    opened = inspected(verb)
    if verb.model is not None and verb.out is None:
        raise ValueError("view --model needs --out FILE: give one for its page")
    out = verb.out or verb.run / ("prompt.html" if verb.prompt is not None else "view.html")
    if verb.prompt is None:
        graph = opened.edges(verb.rows, verb.enough, verb.memory << 20)
        picture = of_graph(graph, top_contexts(opened.subject, graph, graph.index.inner, opened.sample(verb.rows), SHOWN), verb.nodes)
        title = f"{opened.part} of {opened.folder}"
    else:
        picture, title = prompt_picture(opened, verb), f"a prompt in the {opened.part} of {opened.folder}"
    write_text(out, page(picture, title))
    print(json.dumps({"page": str(out), "nodes": len(picture.dots), "edges": len(picture.lines), "about": visible(picture.about)}) if verb.json else
          f"{picture.about}\n{out}")
    return 0


def prompt_picture(opened: Opened, verb: config.View) -> Picture:
    """The prompt's graph, exported too if asked."""
    host, text = opened.subject.host, (verb.prompt or "").replace("\\n", "\n")
    ids = opened.ids(text, "--prompt")
    graph = attribute(opened.subject, torch.tensor([ids]), verb.influence, most=verb.nodes)
    if verb.tracer is not None:
        features = max(part.count for name, part in opened.subject.basis.items() if name.endswith(".mlp"))
        scan = f"{opened.folder.name}-{opened.part}"
        made = export(graph, ids, text, verb.tracer.stem, scan, host.config.num_hidden_layers, features, graph.kept)
        validate(made)
        write_json(verb.tracer, made)
    return of_prompt(graph)


def page(picture: Picture, title: str) -> str:
    """The picture as one offline HTML page."""
    nodes = [{key: value for key, value in asdict(dot).items() if key != "contexts"} | {
        "contexts": [[round(c.activation, 3), visible(c.before), visible(c.token), visible(c.after)] for c in dot.contexts]} for dot in picture.dots]
    for node in nodes:
        node |= {"name": visible(node["name"]), "line": visible(node["line"]), "said": visible(node["said"]), "size": round(node["size"], 5)}
    data: dict[str, Any] = {"nodes": nodes, "edges": [[s, t, float(f"{w:.4g}"), round(share, 5)] for s, t, w, share in picture.lines],
                            "rows": [visible(row) for row in picture.rows], "tokens": [visible(token) for token in picture.tokens],
                            "about": visible(picture.about)}
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return environment().get_template("view.html.j2").render(title=visible(title), data=text)
