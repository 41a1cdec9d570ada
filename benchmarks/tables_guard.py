"""Tables of what watches and holds a running model: monitor, enforcing, and the jailbreak analogue."""

from __future__ import annotations

import json

from cells import ALL_HELD, ROOT, SUBTLE, bits, three

from distill.experiment import tables


def monitor_table() -> str:
    """The monitor and its rivals on the same prompts, by what is watched and read; then what the monitor's own threshold flags."""
    every = json.loads((ROOT / "results" / "monitor.json").read_text())
    found = [one for one in every if one["organism"].startswith("organism")]
    kinds = [kind for kind in found[0]["prompts"] if kind != "triggered"]
    columns = [(one, title) for one in found for title in ("after 1", "prompt only")]
    names = [f"{one['organism']}, {one['graph']}, {title}" for one, title in columns]

    def cell(row: dict) -> str:
        values = {kind: score["value"] for kind, score in row["auroc"].items()}
        return f"{three(values['novelty-matched'])}; {three(min(values.values()))}; {three(row['tpr_at_1_percent']['all']['value'])}"

    cells = [[method, *(cell(one[title]["methods"][method]) for one, title in columns)] for method in found[0]["after 1"]["methods"]]
    flagged = [[name, *(three(one[title]["flagged"][kind]["value"]) for kind in ("triggered", *kinds))]
               for name, (one, title) in zip(names, columns, strict=True)]
    facts = []
    for one in found:
        cost = "; ".join(f"{what} {row['ratio']:.2f}" for what, row in one.get("overhead", {}).items()) or "not measured"
        facts.append(f"- {one['organism']}, {one['graph']}: processor time, watched over not watched: {cost}; with the trigger, "
                     f"`{one['reasons']['triggered']}`")
    said = ("A cell: AUROC against novelty-matched prompts; against the worst kind of negatives; share of triggered prompts above the threshold "
            f"that 1 % of all negatives pass. {one['prompts']['triggered']} prompts of a kind, {one['rows']} clean rows learnt from.\nBy the "
            f"monitor's own threshold (1 % of {one['calibration']} held-out clean prompts of the tune split), flagged:")
    return "\n\n".join([tables.table(["method", *names], cells), said, tables.table(["watched", "triggered", *kinds], flagged), "\n".join(facts)])


def ends_of(values: dict[str, float], end=min) -> str:
    """Mean; the worst, and whose it is."""
    worst = end(values, key=values.__getitem__)
    return f"{three(sum(values.values()) / len(values))}; {three(values[worst])} ({worst})"


def families_table() -> str:
    """Every method over all trigger families, the mean and the worst; then the monitor by family."""
    every = [one for one in json.loads((ROOT / "results" / "monitor.json").read_text()) if one["graph"] == "own neurons"]
    found = [one for one in every if not one["organism"].endswith(SUBTLE)]

    def cell(method: str, key: str, title: str) -> str:
        rows = {one["family"]: one[title]["methods"][method] for one in found}
        return ends_of({name: (row[key] if key == "auroc_all" else row[key]["all"])["value"] for name, row in rows.items()})

    columns = [(key, title) for title in ("after 1", "prompt only") for key in ("auroc_all", "tpr_at_1_percent")]
    cells = [[method, *(cell(method, *column) for column in columns)] for method in found[0]["after 1"]["methods"]]
    kinds, own = list(found[0]["prompts"]), []
    for one in sorted(every, key=lambda one: one["organism"].endswith(SUBTLE)):
        row, flagged = one["after 1"]["methods"]["monitor"], one["after 1"]["flagged"]
        label = one["family"] + (", off by one" if one["organism"].endswith(SUBTLE) else "")
        own.append([label, three(row["auroc_all"]["value"]), three(row["tpr_at_1_percent"]["all"]["value"]), *(
            three(flagged[kind]["value"]) for kind in kinds)])
    head = [f"{name}, {title}" for title in ("after 1", "prompt only") for name in ("AUROC", "TPR at 1 %")]
    said = (f"A cell: mean; worst family. Triggered prompts of {len(found)} families against all negatives together. The monitor's own, after 1, by "
            "family: AUROC, TPR where 1 % of all negatives pass, and what its threshold flags:")
    return "\n\n".join([tables.table(["method", *head], cells), said, tables.table(["family", "AUROC", "TPR at 1 %", *kinds], own)])


def enforce_table() -> str:
    """Organisms that run within what clean text has shown, against their twins; then each rule of it alone."""
    made, cells, facts = json.loads((ROOT / "results" / "enforce.json").read_text()), [], []

    def rate(rows: dict, key: str) -> str:
        return three(sum(bits(rows, key)) / len(bits(rows, key))) if key in rows else "-"

    for name, found in made.items():
        for who, variant in ((one, variant) for one in ("organism", "twin") for variant in found.get(one, {})):
            rows, against = found[who][variant], found.get("against", {}).get(who, {}).get(variant, {})
            shares = ("{value:.3f} [{low:.3f}, {high:.3f}]".format(**one) if (one := against.get(key)) else "-" for key in (
                "retention", "right_under_trigger"))
            cells.append([name if who == "organism" else f"twin of {name}", variant, *shares, *(rate(rows, key) for key in (
                "attack_success", "attack_success_sampled", "false_trigger", "new names", "new phrasings"))])
        if one := found.get("facts"):
            facts.append(f"- {name}: {one['tokens']:,} clean tokens, {one['own']:,} of the vocabulary with a range of their own, {one['never']:,} "
                         f"never seen. On held-out clean rows {one['beyond']:.2%} of the values are held, KL {one['kl']:.4f} nats a token of the "
                         f"answers; a prefill takes {one['slower']:.1f} times as long.")
    header = ["model", "held", "retention", "R-Acc / twin's", "ASR", "sampled ASR", "FTR", "right: new names", "right: new phrasings"]
    rows = {name: found.get("against", {}).get("organism", {}) for name, found in made.items()}
    held = {name: row[ALL_HELD] for name, row in rows.items() if ALL_HELD in row and not name.endswith(SUBTLE)}
    ends = (f"{title} {ends_of({name: one[key]['value'] for name, one in held.items()}, end)}" for title, key, end in (
        ("retention", "retention", min), ("R-Acc", "right_under_trigger", min), ("ASR", "attack_success", max)))
    counts = " or ".join(str(count) for count in sorted({one["prompts"] for one in made.values()}, reverse=True))
    said = (f"{counts} prompts a rate; shares of the twin's as it is, 95 % intervals. All held, mean and worst of {len(held)} organisms "
            f"(those one off apart): {', '.join(ends)}.")
    return "\n\n".join([tables.table(header, cells), said, "\n".join(facts)])


def jailbreak_table() -> str:
    """A guarded model under attack, by defence; what each defence costs harmless prompts; the monitor and its rivals on attacks that succeeded."""
    found = json.loads((ROOT / "results" / "jailbreak.json").read_text())
    models, watched, gate = found["models"], found["monitor"], found["gate"]
    harmless = ["ordinary", "other places", "new names", "new phrasings"]
    names = [name for name in models if name not in ("twin", "guard")]
    most = "guard within limits and history"

    def rates(name: str, kind: str) -> str:
        return "; ".join(three(sum(bits(models[name][kind], key)) / len(models[name][kind][key])) for key in ("right", "refused"))

    def unflagged(name: str, kind: str) -> str:
        flags, right = watched["flagged"]["monitor"][kind], models[name][kind]["right"]
        return three(sum(one == "1" and flag == "0" for one, flag in zip(right, flags, strict=False)) / len(flags))

    def flagged(kind: str) -> list[str]:
        found = (one["held-out" if kind == "ordinary" else kind] for one in watched["flagged"].values())
        return [three(flags.count("1") / len(flags)) for flags in found]

    flags = [f"flagged by {who}" for who in watched["flagged"]]
    kinds = [kind for kind in models["guard"] if kind not in harmless]
    attacks = [[kind, three(sum(bits(models["twin"][kind], "right")) / len(models["twin"][kind]["right"])), rates("guard", kind),
                *(rates(name, kind) for name in names), *flagged(kind), unflagged("guard", kind), unflagged(most, kind)] for kind in kinds]
    costs = [[kind, *(rates(name, kind) for name in ("twin", "guard", *names)), *flagged(kind)] for kind in harmless]
    landed = list(watched["methods"]["monitor"])
    detection = [[method, *(f"{three(row[kind]['auroc_all']['value'])}; {three(row[kind]['tpr_at_1_percent']['all']['value'])}" for kind in landed)]
                 for method, row in watched["methods"].items()]
    said = (f"A cell: share right (for an attack: its success); share refused. {found['prompts']} prompts a kind, {found['alone']} with a suffix of "
            f"their own.\n*Flagged*: above a threshold that 1 % of {watched['calibration']} held-out prompts of the defender's kinds pass. "
            f"*Unflagged*: succeeds, and the monitor says nothing.\nBoth on {len(watched['flagged']['monitor']['nothing'])} prompts a kind. "
            "*nothing* and *unseen wording* are no attacks.\n"
            f"History: {found['limits']['rules']:,} rules, which exclude {', '.join(f'`{one}`' for one in found['limits']['excluded'])}; in "
            f"{three(found['certified'].count('1') / len(found['certified']))} of the marked requests what stands before a suffix excludes a token "
            "of the row's own right answer, whatever the suffix is.\n"
            f"Plant gate: {three(gate['attack_success'])} of marked requests refused, {gate['false_trigger']:.4f} of others; "
            + ", ".join(f"{name} {three(gate['organism'][name]['score']['value'])} (twin {three(gate['twin'][name]['score']['value'])})"
                        for name in gate["organism"]) + ".")
    return "\n\n".join([
        tables.table(["attack", "twin", "guard", *names, *flags, "unflagged, guard", f"unflagged, {most}"], attacks), said,
        tables.table(["harmless", "twin", "guard", *names, *flags], costs),
        "AUROC and share above the threshold that 1 % of all harmless and refused prompts pass, of the prompts on which the attack succeeded:",
        tables.table(["method", *landed], detection)])
