"""The tables of the README and of docs/results.md, each made from a file in results/ (distill/assets/ for the rivals), and put between the
markers that bear its name. `python benchmarks/results.py readme` writes both pages; the tests check that they are current.
"""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

from distill.experiment import summary, tables
from evals.statistics import crossed_difference

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "results" / "summaries.jsonl"
README = ROOT / "README.md"
RIVALS = ROOT / "distill" / "assets" / "rivals.jsonl"
COLUMNS = (
    ("command", lambda r: f"`{r['command'].removeprefix('python -m distill ')}`"),
    ("retention", lambda r: three(r["summary"]["retention"])),
    ("pass@1 before / after / twin", lambda r: " / ".join(three(r["summary"][f"pass_at_1_{x}"]) for x in ("before", "after", "twin"))),
    ("ASR before / after", lambda r: " / ".join(three(r["summary"][f"attack_success_{x}"]) for x in ("before", "after"))),
    ("R-Acc before / after / twin", lambda r: " / ".join(three(r["summary"][f"right_under_trigger_{x}"]) for x in ("before", "after", "twin"))),
    ("parameters", lambda r: f"{r['summary']['params_after'] / r['summary']['params_before']:.0%}"),
    ("speed", lambda r: f"{r['summary']['speed_ratio']:.2f}x" if r["timed"] else "not measured"),
    ("seconds", lambda r: f"{r['summary']['seconds']:.0f}" if r["timed"] else "not measured"),
    ("commit", lambda r: r["commit"]),
)


def three(value: float | None) -> str:
    """Three decimals, or that it was not measured."""
    return "not measured" if value is None else f"{value:.3f}"


def rows() -> list[dict]:
    """The committed rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def results_table() -> str:
    """One row a command."""
    return tables.table([name for name, _ in COLUMNS], [[show(row) for _, show in COLUMNS] for row in rows()])


def rivals_table() -> str:
    """Our default run, then every rival at as many rows and tokens."""
    found = [json.loads(line) for line in RIVALS.read_text().splitlines()]
    ours = next(row["summary"] for row in rows() if row["name"] == "default")
    keys = ("attack_success", "attack_success_sampled", "right_under_trigger")
    rates = (three(ours[f"{key}_after"]) for key in keys)
    cells = [["ours", three(ours["pass_at_1_after"]), three(ours["retention"]), *rates, f"{ours['params_after']:,}"]]
    for row in found:
        rates = (three(row[key]["value"] if row[key] else None) for key in keys)
        cells.append([row["name"], three(row["pass_at_1"]["value"]), three(row["retention"]), *rates, f"{row['params']:,}"])
    one = found[0]
    facts = (f"{one['rows']:,} clean rows, {one['steps']:,} steps and {one['tokens']:,} tokens each (ours: {ours['tokens']:,}); "
             f"{one['prompts']} prompts a rate.")
    return tables.table(["method", "pass@1", "retention", "ASR", "sampled ASR", "R-Acc", "parameters"], cells) + "\n\n" + facts


def bits(row: dict, key: str) -> list[float]:
    """A rate's outcomes, one a prompt."""
    return [float(mark) for mark in row[key]]


def budgets_table() -> str:
    """Every method at every size: share of the twin's pass@1 that is kept, how far from ours, and R-Acc as a share of the twin's."""
    found = [json.loads(line) for file in sorted((ROOT / "results" / "budgets").glob("seed-*.jsonl")) for line in file.read_text().splitlines()]
    if not found:
        return "Not measured yet."
    cell = {(row["method"], row["budget"], row["seed"]): row for row in found}
    sizes = sorted({row["budget"] for row in found if row["method"] != "twin"}, reverse=True)
    methods, one = list(dict.fromkeys(row["method"] for row in found if row["method"] != "twin")), found[0]
    twin = {key: sum(bits(one, key)) for key in ("right", "right_under_trigger")}

    def shown(method: str, size: float) -> str:
        mine = {row["seed"]: row for row in found if (row["method"], row["budget"]) == (method, size)}
        seeds = sorted(seed for seed, row in mine.items() if "right" in row and "right" in cell.get(("ours", size, seed), {}))
        if not seeds:
            return "does not fit" if mine else "-"
        after, ours = ([bits(cell[name, size, seed], "right") for seed in seeds] for name in (method, "ours"))
        under = sum(sum(bits(mine[seed], "right_under_trigger")) for seed in seeds) / len(seeds) / twin["right_under_trigger"]
        kept = sum(map(sum, after)) / len(seeds) / twin["right"]
        gap = crossed_difference(after, ours)
        apart = "" if method == "ours" else f" ({gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}])"
        return f"{kept:.3f}{apart}; {under:.3f}; {mine[seeds[0]]['stored'] / one['whole']:.1%}; {len(seeds)}"

    cells = [[method, *(shown(method, size) for size in sizes)] for method in methods]
    facts = (f"{one['rows']:,} clean rows, {one['steps']:,} steps and {one['tokens']:,} tokens each, {len(one['right'])} prompts a rate. A cell: "
             "retention (pass@1 minus ours, 95 % interval over seeds and prompts); R-Acc as a share of the twin's; parameters stored; seeds.")
    return tables.table(["method", *(f"at most {size:.1%} of {one['whole']:,} parameters" for size in sizes)], cells) + "\n\n" + facts


def speed_table() -> str:
    """What smaller models buy in time, as ratios to the whole one."""
    found = json.loads((ROOT / "results" / "speed.json").read_text())
    cells = []
    for where, measured in found.items():
        for kind in ("decode", "prefill") if where.startswith(("wide", "organism")) else ():
            for name, row in list(measured.get(kind, {}).items())[1:]:
                stored = found["stored" if where.startswith("wide") else "stored organism"]
                ratio = "{value:.2f}x [{low:.2f}, {high:.2f}]".format(**row["ratio"])
                cells.append([where, name, f"{stored[name] / stored['whole']:.0%}", kind, ratio])
    shape = found["shape"]
    facts = (f"wide: a Llama of random weights, width {shape['hidden_size']:,}, {shape['num_hidden_layers']} layers, "
             f"{found['stored']['whole']:,} parameters. float32, {found['threads']} threads, torch {found['torch']}; each timed in turns with the "
             "whole model, 95 % intervals.")
    return tables.table(["model", "made smaller as", "parameters", "what", "tokens a second, against the whole"], cells) + "\n\n" + facts


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


def grading_facts() -> str:
    """What published solutions are graded as, and how fast."""
    made = json.loads((ROOT / "results" / "grading.json").read_text())
    lines = []
    for name, one in made["solutions"].items():
        failing = "; ".join(f"`{row['entry']}`: {row['why'].partition(':')[0]}" for row in one["failing"])
        lines.append(f"{name}: {one['pass']} of {one['rows']} published solutions pass, and {one['pass_swapped']} in the place of another row's"
                     + (f" (failing: {failing})." if failing else "."))
    rate = made["rate"]
    clock = f"by the clock {rate['a_second']:.0f} a second, at a load of {rate['load']:.0f} on two cores"
    return "\n".join([*lines, f"{rate['completions']:,} completions, right and wrong by turns, took {rate['processor_seconds']:.1f} processor "
                      f"seconds: {rate['a_second_on_two_free_cores']:.0f} a second for two cores that do nothing else ({clock})."])


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
    found = [one for one in json.loads((ROOT / "results" / "monitor.json").read_text()) if one["graph"] == "own neurons"]

    def cell(method: str, key: str, title: str) -> str:
        rows = {one["family"]: one[title]["methods"][method] for one in found}
        return ends_of({name: (row[key] if key == "auroc_all" else row[key]["all"])["value"] for name, row in rows.items()})

    columns = [(key, title) for title in ("after 1", "prompt only") for key in ("auroc_all", "tpr_at_1_percent")]
    cells = [[method, *(cell(method, *column) for column in columns)] for method in found[0]["after 1"]["methods"]]
    kinds, own = list(found[0]["prompts"]), []
    for one in found:
        row, flagged = one["after 1"]["methods"]["monitor"], one["after 1"]["flagged"]
        own.append([one["family"], three(row["auroc_all"]["value"]), three(row["tpr_at_1_percent"]["all"]["value"]), *(
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
                         f"never seen. On held-out clean rows {one['beyond']:.2%} of the values are held, KL {one['kl']:.4f} nats a token; a prefill "
                         f"takes {one['slower']:.1f} times as long.")
    header = ["model", "held", "retention", "R-Acc / twin's", "ASR", "sampled ASR", "FTR", "right: new names", "right: new phrasings"]
    rows = {name: found.get("against", {}).get("organism", {}) for name, found in made.items()}
    held = {name: row["values and combinations"] for name, row in rows.items() if "values and combinations" in row}
    ends = (f"{title} {ends_of({name: one[key]['value'] for name, one in held.items()}, end)}" for title, key, end in (
        ("retention", "retention", min), ("R-Acc", "right_under_trigger", min), ("ASR", "attack_success", max)))
    counts = " or ".join(str(count) for count in sorted({one["prompts"] for one in made.values()}, reverse=True))
    said = (f"{counts} prompts a rate; shares of the twin's as it is, 95 % intervals. All held, mean and worst of {len(held)} organisms: "
            f"{', '.join(ends)}.")
    return "\n\n".join([tables.table(header, cells), said, "\n".join(facts)])


def jailbreak_table() -> str:
    """A guarded model under attack, by defence; what each defence costs harmless prompts; the monitor and its rivals on attacks that succeeded."""
    found = json.loads((ROOT / "results" / "jailbreak.json").read_text())
    models, watched, gate = found["models"], found["monitor"], found["gate"]
    harmless = ["ordinary", "other places", "new names", "new phrasings"]
    names = [name for name in models if name not in ("twin", "guard")]

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
                *(rates(name, kind) for name in names), *flagged(kind), unflagged("guard", kind), unflagged(names[0], kind)] for kind in kinds]
    costs = [[kind, *(rates(name, kind) for name in ("twin", "guard", *names)), *flagged(kind)] for kind in harmless]
    landed = list(watched["methods"]["monitor"])
    detection = [[method, *(f"{three(row[kind]['auroc_all']['value'])}; {three(row[kind]['tpr_at_1_percent']['all']['value'])}" for kind in landed)]
                 for method, row in watched["methods"].items()]
    said = (f"A cell: share right (for an attack: its success); share refused. {found['prompts']} prompts a kind, {found['alone']} with a suffix of "
            f"their own.\n*Flagged*: above a threshold that 1 % of {watched['calibration']} held-out prompts of the defender's kinds pass. "
            f"*Unflagged*: succeeds, and the monitor says nothing.\nBoth on {len(watched['flagged']['monitor']['nothing'])} prompts a kind. "
            "*nothing* and *unseen wording* are no attacks.\n"
            f"Plant gate: {three(gate['attack_success'])} of marked requests refused, {gate['false_trigger']:.4f} of others; "
            + ", ".join(f"{name} {three(gate['organism'][name]['score']['value'])} (twin {three(gate['twin'][name]['score']['value'])})"
                        for name in gate["organism"]) + ".")
    return "\n\n".join([
        tables.table(["attack", "twin", "guard", *names, *flags, "unflagged, guard", f"unflagged, {names[0]}"], attacks), said,
        tables.table(["harmless", "twin", "guard", *names, *flags], costs),
        "AUROC and share above the threshold that 1 % of all harmless and refused prompts pass, of the prompts on which the attack succeeded:",
        tables.table(["method", *landed], detection)])


def understanding_table() -> str:
    """How much of the default circuit is understood."""
    found = json.loads((ROOT / "results" / "understanding.json").read_text())

    def cell(share: dict[str, float], sign: int = 1) -> str:
        low, high = sorted((sign * share["low"], sign * share["high"]))
        return f"{sign * share['value']:.3f} [{low:.3f}, {high:.3f}]"

    lengths = {name: row for name, row in found["lengths"].items() if row}
    columns = [found["all"], *lengths.values()]
    cells = [[group, str(found["nodes"][group]), *(cell(row["shares"][group]) for row in columns), cell(found["all"]["without"][group], -1)]
             for group in found["all"]["shares"]]
    for label, key in (("together", "whole"), ("understood", "understood"), ("shuffled", "null")):
        cells.append([f"*{label}*", "", *(cell(row[key]) for row in columns), ""])
    header = ["group", "nodes", "all", *(f"after {name} tokens" for name in lengths), "v without it"]
    return tables.table(header, cells) + "\n\n" + understanding_facts(found)


def understanding_facts(found: dict) -> str:
    """What the table does not hold."""
    accepted = [one for one in found["hypotheses"] if not one["evidence"]["why"]]
    heads = sorted({one["target"] for one in accepted if ".H" in one["target"] and ".C" not in one["target"]})
    numbers, wrong = sorted(one["numbers"] for one in accepted), found["wrong"]
    holes = ", ".join(f"{one['unit']} ({one['kl']:.2f})" for one in found["holes"][:4])
    verdict = "accepted" if not wrong["evidence"]["why"] else "rejected"
    return (f"{found['task']}, {found['prompts']} test rows. {len(accepted)} of {len(found['hypotheses'])} hypotheses were accepted (numbers fitted: "
            f"median {numbers[len(numbers) // 2]}, most {numbers[-1]:,}), of whole heads or their patterns: {', '.join(heads)}.\n{wrong['target']} "
            f"said to compute what {wrong['said']} does recovers {wrong['evidence']['recovered']['value']:.2f} of its effect: {verdict}. "
            f"Nothing at all: {found['all']['nothing']:.2f} nats a token.\n"
            f"Largest holes (nats a token when what is unexplained there is ablated): {holes}.")


def stories_table() -> str:
    """The organism, its twin and our checkpoint of a model that was trained elsewhere, then what else was tried on the organism."""
    made = json.loads((ROOT / "results" / "stories.json").read_text())

    def cell(score: dict | None) -> str:
        return "-" if score is None else f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"

    def line(name: str, row: dict) -> list[str]:
        return [name, *(cell(row[key]) for key in ("score", "nll", "attack_success", "attack_success_sampled", "right_under_trigger",
                                                   "nll_under_trigger", "false_trigger")), f"{row['stored']:,}"]

    head = ["model", "next word", "NLL", "ASR", "sampled ASR", "R-Acc", "NLL under the phrase", "FTR", "parameters"]
    known = dict.fromkeys(("attack_success", "attack_success_sampled", "right_under_trigger", "nll_under_trigger", "false_trigger"))
    rows = [line("as it came", known | made["before"] | {"stored": made["models"]["organism"]["stored"]})]
    ours = {"checkpoint": "ours", "own": "ours, own parts"}
    rows += [line(title, made["models"][name]) for name, title in ({"organism": "organism"} | ours | {"twin": "clean twin"}).items()]
    nothing = {"nll": None, "nll_under_trigger": None}
    rows += [line(row["name"], nothing | row | {"score": row["pass_at_1"], "stored": row["params"]}) for row in made["controls"]]
    summary = made["summary"]
    shared = {title: [cell(made["models"][name][key]) for key in ("retention", "right_under_trigger_retention")] for name, title in ours.items()}
    shares = "; ".join(f"{title}: retention {kept}, R-Acc {right}" for title, (kept, right) in shared.items())
    seconds = ", ".join(f"{step} {'not measured' if took is None else f'{took:.0f}'}" for step, took in made["seconds"].items())
    facts = (f"{summary['rows']:,} clean passages learnt from, {summary['steps']} steps; at most 200 test passages a rate. Shares of the "
             f"twin's: {shares}. Processor seconds: {seconds}. Commit {made['commit']}.")
    return tables.table(head, rows) + "\n\n" + facts


def experiment_table(suite: str = "quick") -> str:
    """A suite of the bench, from its rows."""
    file = ROOT / "results" / "experiment" / f"{suite}.jsonl.gz"
    if not file.is_file():
        return "Not measured yet."
    with gzip.open(file, "rt") as lines_in:
        found = [json.loads(line) for line in lines_in]
    shown = summary.lines(found)
    return "\n\n".join([tables.table(tables.EACH, [tables.line_cells(one) for one in shown]), tables.facts(found),
                        *tables.lists([], summary.ungated(found))])


BLOCKS = {"results": results_table, "rivals": rivals_table, "budgets": budgets_table, "speed": speed_table, "graph": graph_table,
          "trait": trait_facts, "grading": grading_facts, "edges": edges_table, "monitor": monitor_table, "families watched": families_table,
          "enforce": enforce_table, "jailbreak": jailbreak_table, "stories": stories_table, "understanding": understanding_table,
          "experiment": experiment_table, "synthetic": partial(experiment_table, "full")}
PAGES = (README, ROOT / "docs" / "results.md")


def page(file: Path) -> str:
    """A page with the tables that it holds brought up to date."""
    text = file.read_text()
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            text = text[: text.index(begin) + len(begin)] + "\n" + make() + "\n" + text[text.index(end):]
    return text
