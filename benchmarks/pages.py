"""The tables of the README and of docs/results.md, each made from a file in results/ (distill/assets/ for the rivals), and put between the
markers that bear its name. `python benchmarks/results.py readme` writes both pages; the tests check that they are current.
"""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

from cells import ROOT, bits, three
from tables_graph import edges_table, graph_table, holes_table, trait_facts, understanding_table
from tables_guard import enforce_table, families_table, jailbreak_table, monitor_table

from distill.experiment import summary, tables
from evals.statistics import crossed_difference

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


def rows() -> list[dict]:
    """The committed rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def results_table() -> str:
    """One row a command."""
    return tables.table([name for name, _ in COLUMNS], [[show(row) for _, show in COLUMNS] for row in rows()])


def rivals_table() -> str:
    """Our default run, then every rival, with the tokens that each trained on."""
    found = [json.loads(line) for line in RIVALS.read_text().splitlines()]
    default = next(row for row in rows() if row["name"] == "default")
    ours = default["summary"]
    keys = ("attack_success", "attack_success_sampled", "right_under_trigger")
    rates = (three(ours[f"{key}_after"]) for key in keys)
    cells = [["ours", three(ours["pass_at_1_after"]), three(ours["retention"]), *rates, f"{ours['params_after']:,}", f"{ours['tokens']:,}",
              default["commit"]]]
    for row in found:
        rates = (three(row[key]["value"] if row[key] else None) for key in keys)
        cells.append([row["name"], three(row["pass_at_1"]["value"]), three(row["retention"]), *rates, f"{row['params']:,}", f"{row['tokens']:,}",
                      row.get("commit") or "earlier"])
    facts = f"{found[0]['rows']:,} clean rows; {found[0]['prompts']} prompts a rate."
    return tables.table(["method", "pass@1", "retention", "ASR", "sampled ASR", "R-Acc", "parameters", "tokens", "commit"], cells) + "\n\n" + facts


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
                cells.append([where, name, f"{stored[name] / stored['whole']:.0%}", kind, times(row["ratio"])])
    shape = found["shape"]
    facts = (f"wide: a Llama of random weights, width {shape['hidden_size']:,}, {shape['num_hidden_layers']} layers, "
             f"{found['stored']['whole']:,} parameters. float32, {found['threads']} threads, torch {found['torch']}; each timed in turns with the "
             "whole model, 95 % intervals.")
    return tables.table(["model", "made smaller as", "parameters", "what", "tokens a second, against the whole"], cells) + "\n\n" + facts


def scaling_table() -> str:
    """How a step grows along each axis, and the exponents."""
    found = json.loads((ROOT / "results" / "scaling.json").read_text())
    base, cells = found["base"], []
    for axis in base:
        along = sorted((row for row in found["rows"] if all(row["point"][key] == base[key] for key in base if key != axis)),
                       key=lambda row: row["point"][axis])
        clock = "clock" if axis == "processes" else "processor"
        for place, stage in enumerate(along[0]["stages"]):
            slopes = found["exponents"].get(axis, {}).get(stage)
            cells.append([f"{axis} {', '.join(format(row['point'][axis], ',') for row in along)}", stage,
                          ", ".join(f"{1000 * row['stages'][stage][clock]:,.0f}" for row in along),
                          *(f"{slopes[key]:.2f}" if slopes else "-" for key in ("processor", "operations")),
                          ", ".join(f"{sum(one['memory'] for one in [*row['stages'].values()][: place + 1]) / 1e6:,.0f}" for row in along)])
    others = ", ".join(f"{name} {value:,}" for name, value in base.items())
    facts = f"The others as here: {others}. float32, one thread a process, torch {found['torch']}; of processes the clock's time."
    return tables.table(["along", "step", "milliseconds", "exponent", "of the operations", "MB more so far"], cells) + "\n\n" + facts


def times(score: dict | None) -> str:
    """A ratio with its interval."""
    return "-" if score is None else "{value:.2f}x [{low:.2f}, {high:.2f}]".format(**score)


def peers_fit_table() -> str:
    """Our fit against the peers' trainers."""
    cells = [["{layers} x {width:,}, {features:,}".format(**race["job"]), name.replace(" no", ", float32").replace(" bf16", ", bf16"),
              f"{row['tokens_per_second']:,.0f}", "-" if "sparsify" in name else f"{row['share']:.0%}",
              "-" if name == "ours bf16" else times(row["ours_over_it"]), "-" if "ours" in name else times(row["ours_over_it_same_precision"]),
              f"{row['fvu'][-1]:.3f}", f"{row['l0'][-1]:,.0f}", "-" if "ours" in name else f"{row['ours_over_it_to_equal_fvu']:.2f}x"]
             for race in json.loads((ROOT / "results" / "peers.json").read_text())["fits"] for name, row in race["sides"].items()]
    return tables.table(["layers x width, features", "trainer", "tokens a second", "of the matrix rate", "ours, bf16, over it",
                         "ours in its precision over it", "FVU at the end", "active", "its time to equal FVU over ours"], cells)


def peers_memory_table() -> str:
    """What each trainer holds at most while it trains."""
    races = json.loads((ROOT / "results" / "peers.json").read_text())["memory"]
    cells = [["1 x {width:,}, {features:,}".format(**race["job"]), *(f"{held / 1e6:,.0f} MB" for held in race["bytes"].values())] for race in races]
    return tables.table(["layers x width, features", *(name.replace(" no", ", float32").replace(" bf16", ", bf16") for name in races[0]["bytes"])],
                        cells)


def peers_trace_table() -> str:
    """Our prompt graphs against circuit-tracer's."""
    cells = [["{layers} x {width:,}, {per_layer:,}".format(**race["graph"]), str(race["graph"]["tokens"]), f"{race['active']:,}",
              f"{race['made']['circuit_tracer']['features']:,}", f"{race['seconds']['circuit_tracer']:.2f}", f"{race['seconds']['ours']:.2f}",
              times(race["ratio"]), "{features:,} of {nodes:,}".format(**race["made"]["ours"]), times(race["ratio_matched"])]
             for race in json.loads((ROOT / "results" / "peers.json").read_text())["traces"]]
    return tables.table(["layers x width, features", "tokens", "active", "its features", "its seconds", "our seconds", "its time over ours",
                         "features among our nodes", "with as many features"], cells)


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
    seconds = ", ".join(f"{step} {'not measured' if took is None else '{processor:.0f} / {clock:.0f}'.format(**took)}"
                        for step, took in made["seconds"].items())
    facts = (f"{summary['rows']:,} clean passages learnt from, {summary['steps']} steps; at most 200 test passages a rate. Shares of the "
             f"twin's: {shares}. Seconds, of the processor / of the clock on two cores: {seconds}. Commit {made['commit']}.")
    return tables.table(head, rows) + "\n\n" + facts


def experiment_table(suite: str = "quick") -> str:
    """A suite of the bench, or a stage of it, from its rows."""
    file = ROOT / "results" / "experiment" / f"{suite}.jsonl.gz"
    if not file.is_file():
        return "Not measured yet."
    with gzip.open(file, "rt") as lines_in:
        found = [json.loads(line) for line in lines_in]
    shown = summary.lines(found)
    return "\n\n".join([tables.table(tables.EACH, [tables.line_cells(one) for one in shown]), tables.facts(found),
                        *tables.lists([], summary.ungated(found))])


BLOCKS = {"results": results_table, "rivals": rivals_table, "budgets": budgets_table, "speed": speed_table, "scaling": scaling_table,
          "peers-fit": peers_fit_table, "peers-memory": peers_memory_table, "peers-trace": peers_trace_table, "graph": graph_table,
          "trait": trait_facts, "grading": grading_facts, "holes": holes_table, "edges": edges_table, "monitor": monitor_table,
          "families watched": families_table,
          "enforce": enforce_table, "jailbreak": jailbreak_table, "stories": stories_table, "understanding": understanding_table,
          "experiment": experiment_table, "synthetic": partial(experiment_table, "synthetic"),
          "tokens": partial(experiment_table, "tokens")}
PAGES = (README, ROOT / "docs" / "results.md")


def page(file: Path) -> str:
    """A page with the tables that it holds brought up to date."""
    text = file.read_text()
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            text = text[: text.index(begin) + len(begin)] + "\n" + make() + "\n" + text[text.index(end):]
    return text
