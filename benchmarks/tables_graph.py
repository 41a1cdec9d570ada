"""Tables of the graph: what it holds, its holes and edges, a planted trait, and how much is understood."""

from __future__ import annotations

import json

from cells import ROOT, three

from distill.experiment import tables


def graph_table() -> str:
    """How good the fitted graph is, by task, and how many parents a node needs."""
    found = json.loads((ROOT / "results" / "graph.json").read_text())
    cells = []
    for name, row in found["tasks"].items():
        scores = ("{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[key]) for key in ("replacement", "completeness"))
        cells.append([name, f"{row['kl']:.4f}", " / ".join(f"{value:.0f}" for value in row["l0"].values()), *scores])
    settings, parents = found["settings"], found["parents"]
    counts = parents["attention"]
    shown = [share for share in parents["feature"] if float(share) in (0.5, 0.8, 0.9, 0.95)]
    needs = "; ".join(f"{float(share):.0%}: {parents['feature'][share]:.0f} (component: {counts[share]:.0f})" for share in shown)
    places = "; ".join(f"{name}: {value:.3f}" for name, value in found["by_position"].items())
    command = (f"`distill fit --task {','.join(found['tasks'])} --fit-steps {settings['local_steps']} --joint-steps {settings['joint_steps']} "
               f"--sparsity {settings['sparsity']:g}`")
    facts = (f"Fitted by {command}: {settings['features']} features a layer at width {found['d_model']}; edges built in "
             f"{found['edges_seconds']:.0f} s.\n"
             f"Parents that the median feature needs for a share of its absolute drive: {needs}\n([drawn](parents.svg)).\nKL by position in "
             f"packed rows (the longest row it was fitted on has {found['longest']} tokens): {places}.")
    return tables.table(["task", "KL, all swapped", "L0 by layer", "replacement", "completeness"], cells) + "\n\n" + facts


def holes_table() -> str:
    """What a round of mending does to the largest hole, a row a fit."""
    file = ROOT / "results" / "holes.json"
    if not file.is_file():
        return "Not measured yet."
    found, cells = json.loads(file.read_text()), []
    plain = {row["seed"]: row for row in found if row["way"] == "as it is"}
    tops = {row["seed"]: row["mended"].removeprefix("mend ") for row in found if row["mended"]}
    for row in found:
        if row["seed"] not in tops:
            continue
        before, top = plain[row["seed"]], tops[row["seed"]]
        worst = max(row["holes"], key=row["holes"].__getitem__)
        cells.append([str(row["seed"]), row["way"], f"{top}: {row['holes'][top]:.4f} ({row['holes'][top] / before['holes'][top] - 1:+.0%})",
                      f"{row['l0'][top]:.1f}" if top in row["l0"] else "-", f"{row['fvu'][top]:.3f}", f"{worst}: {row['holes'][worst]:.4f}",
                      f"{row['kl_swapped']:.4f}"])
    one = found[0]
    header = ["seed", "fit", "the hole that is mended", "its L0", "its FVU", "the largest hole", "KL, all swapped"]
    facts = f"`mended` and `longer`: {one['steps']} batches more; {one['prompts']} prompts of the test split; nats a completion token."
    return tables.table(header, cells) + "\n\n" + facts


def edges_table() -> str:
    """What a circuit does on a share of its edges, against the twin and the compiled checkpoint."""
    file = ROOT / "results" / "edges.json"
    if not file.is_file():
        return "Not measured yet."
    found, cells = json.loads(file.read_text()), []

    def line(name: str, kept: str, row: dict, slower: dict | None) -> list[str]:
        rates = ("{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[key]) for key in ("retention", "right_under_trigger"))
        cost = "1" if slower is None else "{value:.1f} [{low:.1f}, {high:.1f}]".format(**slower)
        return [name, kept, *rates, three(row["attack_success"]["value"]), cost]

    for row in found["cells"].values():
        if not cells:
            cells.append(line("compiled", "all", row["checkpoint"], None))
        kept, whole = row["edges"]["all"]
        cells.append(line(row["score"], f"{kept:,} of {whole:,} ({kept / whole:.0%})", row["edges_run"], row["slower"]))
    exact = found["exactness"]
    ends = "; ".join(f"{name} {curve['cmd']:.3f}" for name, curve in found.get("curves", {}).items())
    facts = f"CMD of the faithfulness curve, nothing healed (less is better): {ends or 'not measured'}."
    if cells:
        one = next(iter(found["cells"].values()))
        facts += f"\n{one['steps']} batches of healing a row, {one['prompts']} prompts a rate; shares of the twin's, 95 % intervals."
    facts += (f"\nWith every edge the logits (up to {exact['largest_logit']:.0f}) are the checkpoint's to {exact['float64']:.1e} in float64 and to "
              f"{exact['float32']:.1e} in float32,\nwhere the checkpoint itself is {exact['checkpoint_float32']:.1e} from its float64 logits.")
    header = ["edges by", "kept", "retention", "R-Acc / twin's", "ASR", "time a token / checkpoint's"]
    return tables.table(header, cells) + "\n\n" + facts


def trait_facts() -> str:
    """What find says of a planted trait, a row a seed."""
    def control(values: list[float]) -> str:
        return f"{sum(values) / len(values):.3f}, {max(values):.3f}"

    cells = []
    for row in json.loads((ROOT / "results" / "trait.json").read_text()):
        cells.append([str(row["seed"]), *(f"{row['agrees'][who]:.3f}" for who in ("Tom", "Ben")), ", ".join(row["chosen"]),
                      f"{row['flipped']:.3f} of {row['prompts']}", control(row["random_flipped"]),
                      f"{row['induced']:.3f}", control(row["random_induced"])])
    header = ["seed", "agrees with Tom", "with Ben", "nodes held", "answers changed", "by random sets: mean, most", "brought about in partners",
              "by random sets: mean, most"]
    return tables.table(header, cells)


def understanding_table() -> str:
    """How much of the default circuit is understood."""
    found = json.loads((ROOT / "results" / "understanding.json").read_text())

    def cell(share: dict[str, float], sign: int = 1) -> str:
        low, high = sorted((sign * share["low"], sign * share["high"]))
        return f"{sign * share['value']:.3f} [{low:.3f}, {high:.3f}]"

    def columns(named: dict[str, dict], without: bool) -> str:
        rows = [[group, str(found["nodes"][group]), *(cell(row["shares"][group]) for row in named.values()),
                 *[cell(found["all"]["without"][group], -1)] * without] for group in found["all"]["shares"]]
        rows += [[f"*{label}*", "", *(cell(row[key]) for row in named.values()), *[""] * without]
                 for label, key in (("together", "whole"), ("understood", "understood"), ("shuffled", "null"))]
        return tables.table(["group", "nodes", *named, *["v without it"] * without], rows)

    tasks = found["tasks"] if len(found["tasks"]) > 1 else {}
    where = {f"after {name} tokens": row for name, row in found["lengths"].items() if row} | found.get("contexts", {})
    return "\n\n".join([columns({"all": found["all"]} | tasks, True), columns(where, False), understanding_facts(found)])


def understanding_facts(found: dict) -> str:
    """What the table does not hold."""
    accepted = [one for one in found["hypotheses"] if not one["evidence"]["why"]]
    heads = sorted({one["target"] for one in accepted if ".H" in one["target"] and ".C" not in one["target"]})
    numbers, wrong = sorted(one["numbers"] for one in accepted), found["wrong"]
    holes = ", ".join(f"{one['unit']} ({one['kl']:.2f})" for one in found["holes"][:4])
    verdict = "accepted" if not wrong["evidence"]["why"] else "rejected"
    return (f"{found['task']}, {found['prompts']} test rows a task. {len(accepted)} of {len(found['hypotheses'])} hypotheses were accepted "
            f"(numbers fitted: median {numbers[len(numbers) // 2]}, most {numbers[-1]:,}), "
            f"of whole heads or their patterns: {', '.join(heads)}.\n{wrong['target']} "
            f"said to compute what {wrong['said']} does recovers {wrong['evidence']['recovered']['value']:.2f} of its effect: {verdict}. "
            f"Nothing at all: {found['all']['nothing']:.2f} nats a token.\n"
            f"Largest holes (nats a token when what is unexplained there is ablated): {holes}.")
