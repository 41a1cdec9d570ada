"""`distill find`: which nodes carry a trait, with the numbers that a reviewer needs to believe it or to dismiss it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from distill import config
from distill.prompts import lines, texts
from distill.report import visible
from distill.runs import Opened, inspected
from graphs.components import Components
from graphs.edges import Reconstruction
from graphs.find import STRENGTHS, Report, find
from graphs.prompts import Prompts, padded


def run(verb: config.Find) -> int:
    """Find and print; 1 where the control flips as much as what was found."""
    if verb.present is None or verb.absent is None:
        raise ValueError("find needs --present FILE and --absent FILE: give prompts with the trait, and prompts without it")
    opened = inspected(verb)
    present, absent = (read(file, flag, opened) for file, flag in ((verb.present, "--present"), (verb.absent, "--absent")))
    subject = opened.subject if verb.model is None else turned(opened.subject, (present, absent))
    strengths = STRENGTHS if verb.strength is None else (verb.strength,)
    report = find(subject, present, absent, verb.top, strengths, verb.screened, verb.controls, seed=verb.seed)
    print(json.dumps(asdict(report) | {"p_value": report.p_value}, indent=1) if verb.json else page(report))
    return 0 if report.p_value <= 0.05 else 1


def read(file: Path, flag: str, opened: Opened) -> Prompts:
    """The file's prompts as this model tokenises them. Raises ValueError on a missing or empty file, or a prompt that is too long."""
    found = list(texts(lines(file, flag), f"{flag} {file}"))
    if not found:
        raise ValueError(f"{flag} {file}: it holds no prompt; write one a line")
    return padded([opened.ids(text, f"{flag} {file}") for text in found], opened.subject.host.tokenizer.eos_token_id or 0)


def turned(subject: Reconstruction, prompts: tuple[Prompts, ...]) -> Reconstruction:
    """The same model with its attention components in the basis that these prompts' inputs give (`Components.in_metric`)."""
    seen = [subject.trace(one.ids) for one in prompts]
    basis = dict(subject.basis)
    for name, part in subject.basis.items():
        if isinstance(part, Components):
            x = torch.cat([found.sites[name].x[one.real] for found, one in zip(seen, prompts, strict=True)])
            basis[name] = part.in_metric(x.T @ x)
    return Reconstruction(subject.host, basis, subject.stand_ins)


def page(report: Report) -> str:
    """What a person reads."""
    lines = [f"{'node':12} {'costs alone':>12} {'first order':>12} {'mean present':>13} {'mean absent':>12}"]
    lines += [f"{visible(one.name):12} {one.effect:12.3f} {one.guess:12.3f} {one.present:13.3f} {one.absent:12.3f}" for one in report.nodes[:12]]
    flips, costs = report.random_flipped, report.random_cost
    where = "their partners' activations, token by token" if report.paired else "means of the prompts without the trait"
    lines += ["", f"held together at {where}, strength {report.strength:g}: {', '.join(report.chosen)}",
              f"answers changed, {report.prompts} prompts with the trait that chose nothing: {report.flipped:.3f} (log-odds {-report.cost:+.2f})",
              f"the same with {len(flips)} random sets of matched nodes: {sum(flips) / len(flips):.3f}, at most {max(flips):.3f} "
              f"(log-odds {-sum(costs) / len(costs):+.2f}); p = {report.p_value:.3f}",
              _without(report), "", f"{'edge':26} {'excess':>9} {'costs alone':>12}"]
    lines += [f"{visible(e.source + ' -> ' + e.target):26} {e.excess:9.3f} {e.effect:12.3f}" for e in report.edges]
    control = report.random_edge_cost
    if control:
        lines += [f"cut together: log-odds {-report.edge_cost:+.2f}; random edges into the same nodes {-sum(control) / len(control):+.2f}, "
                  f"at most {-max(control):+.2f}"]
    lines += ["", "Columns: log-odds of the answer that holding the node alone takes, really and to first order; its mean activation over tokens.",
              "Excess: contribution a token where the trait is present, less where it is absent."]
    return "\n".join(lines)


def _without(report: Report) -> str:
    """What the same nodes do where there is no trait."""
    if report.induced is None:
        return f"answers changed, prompts without the trait: {report.broken:.3f}"
    random = report.random_induced
    return (f"trait brought about in partners without it, the same nodes held as where it is present: {report.induced:.3f}; by random sets "
            f"{sum(random) / len(random):.3f}, at most {max(random):.3f}")
