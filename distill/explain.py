"""`distill explain`: what one node computes, or what makes a head look where it looks.

    L2.F117 = relu(3.10(+-0.12)*L0.F44 + 4.02(+-0.30)*L1.H2.C3 - 1.20 + rest(+0.04))
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from distill import config
from distill.report import visible
from distill.runs import Opened, inspected
from graphs.attending import Attending, Pair, attending
from graphs.contexts import Context, logit_effects, top_contexts
from graphs.equations import Equation, equation
from graphs.graph import FeatureGraph


def run(verb: config.Explain) -> int:
    """Explain one node."""
    if verb.node is None:
        raise ValueError("explain needs a node: give one (distill explain L2.F117), or let distill listing print them all")
    opened = inspected(verb)
    if head := re.fullmatch(r"L(\d+)\.H(\d+)", verb.node.strip()):
        return _head(verb, opened, int(head[1]), int(head[2]))
    graph = opened.edges(verb.rows, verb.enough, verb.memory << 20)
    node = graph.index.find(verb.node)
    said = equation(graph, node, verb.parents)
    if not said.terms:
        raise ValueError(f"{said.node} was never active on these {graph.tokens:,} clean tokens; give more --rows, or another node")
    contexts = top_contexts(opened.subject, graph, [node], opened.sample(verb.rows), verb.contexts)[node]
    found = {"equation": said, "contexts": contexts, "writes_to": children(graph, node, verb.parents),
             "logits": logit_effects(opened.subject, graph, node)}
    print(json.dumps(facts(found, graph, opened), indent=1) if verb.json else page(found, graph, opened))
    return 0


def _head(verb: config.Explain, opened: Opened, layer: int, head: int) -> int:
    """Explain a head's pattern."""
    site = next((site for site in opened.subject.host.sites if site.name == f"L{layer}.attention"), None)
    if site is None:
        raise ValueError(f"{verb.node}: no such head; layers are L0 to L{opened.subject.host.sites[-1].layer}; name one of theirs")
    found = attending(opened.subject, site, head, opened.sample(verb.rows), verb.parents, verb.memory << 20)
    print(json.dumps(asdict(found), indent=1) if verb.json else looks(found, opened))
    return 0


def looks(found: Attending, opened: Opened) -> str:
    """What a person reads of a head."""
    def table(pairs: tuple[Pair, ...]) -> list[str]:
        return [f"{one.share:6.1%} {one.gain:9.3f} +- {one.error:5.3f}  {visible(one.asks)} -> {visible(one.answers)}" for one in pairs]

    return "\n".join([
        f"{found.head}  ({opened.part} of {opened.folder}; {found.tokens:,} clean tokens)", "",
        f"looks at the first token {found.first:.1%}, at the token itself {found.same:.1%}, at the one before {found.previous:.1%}", "",
        f"Where it looks scores {found.gain:+.3f} above where it could look (nats, mean over tokens). Of that, by pairs of nodes, the one at",
        "the token that looks first, then the one at the token that is looked at:", "",
        f"{'share':>6} {'gain':>18}  asks -> answers", *table(found.pairs), "",
        "the nodes that ask, whatever answers", *table(found.asking), "", "the nodes that answer, whatever asks", *table(found.answering), "",
        "Shares are of the absolute gains of all pairs (of all nodes, in the last two)."])


def children(graph: FeatureGraph, node: int, most: int) -> list[dict[str, Any]]:
    """What the node feeds, where it carries most of the drive first."""
    return [{"node": graph.index.name(int(graph.dst[e])), "coefficient": None if graph.coefficient[e].isnan() else float(graph.coefficient[e]),
             "share": float(graph.share[e])} for e in graph.out_of(node)[:most].tolist()]


def facts(found: dict[str, Any], graph: FeatureGraph, opened: Opened) -> dict[str, Any]:
    """The same as JSON."""
    return {"run": str(opened.folder), "part": opened.part, "tokens": graph.tokens, "line": found["equation"].line(),
            "equation": asdict(found["equation"]), "contexts": [asdict(one) for one in found["contexts"]],
            "writes_to": found["writes_to"], "logits": [{"token": token, "effect": effect} for token, effect in found["logits"]]}


def page(found: dict[str, Any], graph: FeatureGraph, opened: Opened) -> str:
    """What a person reads."""
    said: Equation = found["equation"]
    lines = [f"{said.node}  ({opened.part} of {opened.folder}; active on {said.active:.1%} of {graph.tokens:,} clean tokens)", "", said.line(), "",
             f"{'share':>6} {'coefficient':>18} {'mean flow':>18} {'with':>6}  parent"]
    for term in said.terms:
        coefficient = "-" if term.coefficient is None else f"{term.coefficient:9.3f} +- {term.spread:5.3f}"
        lines.append(f"{term.share:6.1%} {coefficient:>18} {term.flow:9.3f} +- {term.flow_error:5.3f} "
                     f"{term.frequency:6.1%}  {visible(term.source)}")
    lines += ["", f"These {len(said.terms)} parents carry {said.carried:.1%} of the drive; {said.enough} carry {said.explained:.1%}; "
                  f"{said.parents} carry any. What is not printed adds {said.rest:+.3f} on average."]
    if found["contexts"]:
        lines += ["", "most active at"] + [_context(one) for one in found["contexts"]]
    if found["writes_to"]:
        lines += ["", "feeds"]
        lines += [f"{child['share']:6.1%} of {visible(child['node'])} ({child['coefficient']:+.3f} a unit)" for child in found["writes_to"]]
    if found["logits"]:
        lines += ["", "raises  " + _tokens(found["logits"], 1), "lowers  " + _tokens(found["logits"], -1)]
    return "\n".join(lines)


def _context(one: Context) -> str:
    def flat(text: str) -> str:
        return visible(text).replace("\n", "\\n").replace("\t", "\\t")

    return f"{one.activation:8.3f}  {flat(one.before)}>>{flat(one.token)}<<{flat(one.after)}"


def _tokens(effects: list[tuple[str, float]], sign: int) -> str:
    chosen = sorted((one for one in effects if one[1] * sign > 0), key=lambda one: -abs(one[1]))
    return ", ".join(f"{visible(token)!r} {effect:+.3f}" for token, effect in chosen) or "nothing"
