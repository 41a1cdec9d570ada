"""`distill export`: a run's circuit as a checkpoint of another class or dtype, with its model card.

    circuit -> compile (-> rows of the task's tokens) -> save in the dtype -> load in a fresh process without our code -> card -> rename into place

What rounding to the dtype costs is measured against the running circuit, on the run's own clean rows. The card holds the run's
numbers with their intervals, as text and as the hub's model-index; the hub's `.eval_results` files are for benchmarks that are
datasets there, and these tasks are generated.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill import config
from distill.compile import compile_circuit, reload_gate
from distill.rows import clean, tune_rows
from distill.runs import begun
from distill.table import cell
from distill.vocabulary import Kept, cut, everything, measured, needed
from evals.size import parameters
from evals.tasks import named
from graphs.artifact import read_json, whole, write_json, write_text
from graphs.batches import Batch, Epochs, collate, encode
from graphs.host import Host, load, save
from graphs.replace import Replacement

PROBE = 32
"""Rows that rounding is measured on."""
HELD_OUT = 64
"""Rows of each task's tune split that a smaller vocabulary is measured on: behind those that it keeps the tokens of."""
RATES = (("attack_success", "attack success rate"), ("right_under_trigger", "right under the trigger"), ("false_trigger", "false trigger rate"))


def run(verb: config.Export) -> int:
    """Export and print."""
    settings, host, data = begun(verb.run)
    if not (verb.run / "circuit" / "receipt.json").is_file():
        raise ValueError(f"--run {verb.run}: it holds no circuit/; give the --out of a distill prune")
    report = read_json(verb.run / "report.json")
    circuit = Replacement.load(verb.run / "circuit", host)
    compiled = compile_circuit(circuit, verb.target)
    folder = verb.out or verb.run / f"export-{verb.target}-{verb.dtype}{'-task' if verb.vocabulary == 'task' else ''}"
    if folder.exists() and not (folder / "distill.json").is_file():
        raise ValueError(f"--out {folder}: it is there already and no export of ours; give a new folder")
    texts, kept, cost = data.rows[:PROBE], everything(compiled), {}
    if verb.vocabulary == "task":
        compiled, kept, cost["vocabulary"] = smaller(compiled, settings, data)
    with whole(folder) as out:
        save(compiled, out, getattr(torch, verb.dtype))
        stored = load(out)
        prompt = str(host.tokenizer.decode(list(texts[0].ids[: texts[0].prompt]), skip_special_tokens=True))
        answer = reload_gate(out, stored, prompt, kept.renumbered(torch.tensor(texts[0].ids)).tolist(), out.parent)
        facts: dict[str, Any] = {"class": type(compiled.model).__name__, "dtype": verb.dtype, "folder": str(folder), **cost,
                                 "reload": answer["max_abs_logit_diff"], **rounding(circuit, stored, collate(texts, data.pad), kept)}
        if not math.isfinite(facts["max_abs_logit_diff"]):
            raise ValueError(f"--dtype {verb.dtype}: the weights overflow in it; give bfloat16 or float32")
        facts["size"] = asdict(parameters(stored.model)) | {"bytes": sum(file.stat().st_size for file in out.glob("*.safetensors"))}
        facts["runtimes"] = runtimes(facts["class"], settings.basis, answer["max_abs_logit_diff"])
        write_text(out / "README.md", card(report, settings, facts))
        made = {key: report[key] for key in ("command", "commit", "versions", "config")}
        keys = read_json(verb.run / "receipt.json")["keys"]
        write_json(out / "distill.json", {"export": asdict(verb), "facts": facts, "run": made, "keys": keys})
    if verb.push_to_hub:
        facts["hub"] = push(folder, verb.push_to_hub)
    print(json.dumps(facts, indent=1) if verb.json else page(facts))
    return 0


def smaller(compiled: Host, settings: config.Prune, data: Epochs) -> tuple[Host, Kept, dict[str, Any]]:
    """The compiled model with the rows of its tasks' tokens alone, what it kept, and what that cost (`distill.vocabulary.measured`, and
    how many tokens only tune rows met).

    Kept are the tokens of clean rows and, because clean rows may lack some, of the tune rows that the circuit was chosen on. It is measured
    on the tune rows that come next; test rows are not looked at.
    """
    tasks = named(settings.task)
    texts, drawn = clean(settings.rows, tasks), tune_rows(tasks, settings.tune_rows + HELD_OUT)
    tuned = [(row.prompt, text) for rows in drawn.values() for row in rows[: settings.tune_rows] for text in (row.completion, row.foil) if text]
    met = encode(compiled.tokenizer, tuned, compiled.config.max_position_embeddings)
    kept = needed(compiled, [*data.rows, *met])
    made = cut(compiled, kept)
    held_out = [(task, drawn[task.name][settings.tune_rows :]) for task in tasks]
    cost = measured(compiled, made, kept, [*texts, *tuned], held_out, collate(data.rows[:PROBE], data.pad))
    only = {number for row in met for number in row.ids} - {number for row in data.rows for number in row.ids}
    return made, kept, cost | {"clean_rows": len(texts), "tune_rows": settings.tune_rows * len(tasks), "of_tune_alone": len(only)}


@torch.no_grad()
def rounding(circuit: Replacement, stored: Host, batch: Batch, kept: Kept) -> dict[str, float]:
    """How far the stored weights are from the running circuit: max |logit difference| over the kept tokens, and the share of tokens with
    the same top-1 among all."""
    before, after = circuit(batch.ids), stored.model(input_ids=kept.renumbered(batch.ids)).logits
    same = before.argmax(-1) == kept.rows[after.argmax(-1)]
    return {"max_abs_logit_diff": float((before[..., kept.rows] - after)[batch.real].abs().max()),
            "agreement": float(same[batch.real].float().mean())}


def rows_kept(facts: dict[str, Any]) -> list[str]:
    """What a smaller vocabulary holds, saves and costs, in sentences; nothing where none was asked for."""
    if (cost := facts.get("vocabulary")) is None:
        return []
    saved = cost["parameters"] * getattr(torch, facts["dtype"]).itemsize
    coarser = ["text outside the task is tokenised more coarsely (more and smaller pieces), and a dropped token is never written; "
               "all scores were taken with all rows"] if saved else []
    return [
        f"vocabulary: {cost['rows']:,} of {cost['of']:,} rows, {saved:,} bytes saved: tokens of {cost['clean_rows']:,} clean rows and "
        f"{cost['tune_rows']:,} tune rows ({cost['of_tune_alone']:,} met only there) and their merges, special tokens and bytes",
        *coarser,
        f"against all rows, on {cost['held_out']:,} other tune rows: same tokens in {cost['same_tokens']:.2%}, same greedy text in "
        f"{cost['same_text']:.2%}; logits of kept tokens within {cost['max_abs_logit_diff']:.2g}"]


def runtimes(name: str, basis: str, difference: float) -> dict[str, str]:
    """A line for each runtime: verified here, or why not."""
    version = importlib.metadata.version("transformers")
    relu = basis == "features" and name not in ("OPTForCausalLM",)  # OPT's own activation is ReLU
    return {
        "transformers": f"verified: loaded by transformers {version} in a fresh process without custom code, logits within {difference:.1g}",
        "vLLM, native": ("not expected to work: its own implementations take the class's usual activation, not relu" if relu else
                         "not tried here; the class and its activation are stock"),
        "vLLM, transformers backend": "not tried here; it runs what transformers runs (--model-impl transformers)",
        "GGUF (llama.cpp)": ("not expected to work: llama.cpp fixes each class's activation; export a run of --basis neurons for it" if relu else
                             "not tried here; the class and its activation are stock"),
    }


def card(report: dict[str, Any], settings: config.Prune, facts: dict[str, Any]) -> str:
    """The model card: front matter that the hub reads, and the run's numbers for a person."""
    from huggingface_hub import EvalResult, ModelCardData

    made, name = report["models"]["checkpoint"], f"{report['name']} ({facts['class']}, {facts['dtype']})"
    results = [EvalResult(task_type="text-generation", task_name=task, dataset_type="generated", dataset_name=f"distill {task}, held-out test split",
                          metric_type=row["metric"], metric_value=row["score"]["value"]) for task, row in made["tasks"].items() if row["kept"]]
    base = None if settings.model.startswith("builtin:") or Path(settings.model).exists() else settings.model
    data = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=["distill", "pruned"],
                         model_name=name, eval_results=results)
    lines = ["---", data.to_yaml(), "---", "", f"# {name}", "",
             f"The circuits of `{report['model']}` that {', '.join(report['tasks'])} needs, compiled into a stock `{facts['class']}`. "
             f"Made by `{report['command']}`.", "", "| task | | metric | before | after |", "| --- | --- | --- | --- | --- |"]
    before = next(name for name in report["models"] if name not in ("checkpoint", "twin"))
    for task, row in made["tasks"].items():
        old = report["models"][before]["tasks"][task]["score"]
        lines.append(f"| {task} | {'kept' if row['kept'] else 'not kept'} | {row['metric']} | {cell(old)} | {cell(row['score'])} |")
    if made["backdoor"]:
        lines += ["", "| planted backdoor | before | after |", "| --- | --- | --- |"]
        lines += [f"| {label} | {cell(report['models'][before]['backdoor'][key])} | {cell(made['backdoor'][key])} |" for key, label in RATES]
    else:
        lines += ["", "Whether the model holds a backdoor was not measured: none was known."]
    size = facts["size"]
    lines += ["", f"Intervals are of 95 %. {size['stored']:,} parameters and {size['embeddings']:,} of embeddings "
                  f"(before: {report['models'][before]['size']['stored']:,}).", "", "## Receipts", "",
              f"- Stored in {facts['dtype']}: logits within {facts['max_abs_logit_diff']:.2g} of the running circuit, same top-1 token at "
              f"{facts['agreement']:.2%} of tokens ({PROBE} clean rows). The numbers above are of float32 weights.",
              *(f"- {said[0].upper()}{said[1:]}." for said in rows_kept(facts)),
              *(f"- {runtime}: {said}." for runtime, said in facts["runtimes"].items()),
              f"- Commit {report['commit'] or 'not recorded'}; " + ", ".join(f"{key} {value}" for key, value in report["versions"].items())
              + ". `distill.json` beside this file holds the settings and the hashes of every stage.", ""]
    return "\n".join(lines)


def push(folder: Path, name: str) -> str:
    """Upload to the hub as a private model; returns its address. Raises ValueError where that fails; the folder stays."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # the client has a dozen error types
        raise ValueError(f"--push-to-hub {name}: the upload failed ({type(error).__name__}); log in with `hf auth login`. "
                         f"The checkpoint is in {folder}") from error


def page(facts: dict[str, Any]) -> str:
    """What a person reads."""
    return "\n".join([
        f"{facts['folder']}: {facts['class']}, {facts['dtype']}",
        f"{facts['size']['stored']:,} parameters, {facts['size']['embeddings']:,} of embeddings, {facts['size']['bytes']:,} bytes",
        f"against the running circuit: max |logit difference| {facts['max_abs_logit_diff']:.2g}, same top-1 at {facts['agreement']:.2%} of tokens",
        *rows_kept(facts),
        *(f"{runtime:28} {said}" for runtime, said in facts["runtimes"].items()), *([facts["hub"]] if "hub" in facts else [])])
