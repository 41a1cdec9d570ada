"""`distill evaluate`: the judge of runs, on any model folder, and the rivals of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distill import config, synthetic
from distill.edges import judge, page
from distill.models import Secret, find, read_secret, secret_beside
from distill.organism import backdoor_of
from distill.report import write
from distill.rivals import placed, run_rivals
from distill.runs import reopen
from distill.table import table
from evals import harness
from evals.evaluate import EvaluateConfig, judge_models
from evals.tasks import TASKS, named
from graphs.artifact import locked, read_json
from graphs.host import load
from graphs.processes import agreed, several


def run(verb: config.Evaluate) -> int:
    """Judge a run (with its rivals, if asked) or one model."""
    if (verb.run is None) == (verb.model is None):
        raise ValueError("evaluate needs one of the two: give --run DIR or --model NAME")
    if verb.as_ is not None and (verb.run is None or verb.rivals):
        raise ValueError("--as judges the circuit of a run: give --run DIR, and no --rivals")
    if verb.as_ is not None:
        judged = judge(verb)
        agreed(lambda: print(json.dumps({key: value for key, value in judged.items() if key != "rows"}, indent=1) if verb.json else page(judged)))
        return 0
    if verb.rivals and verb.run is None:
        raise ValueError("--rivals makes rivals at the rows and tokens of a run: give --run")
    if verb.part != "checkpoint" and not (verb.lm_eval and verb.run):
        raise ValueError(f"--part {verb.part} goes with --lm-eval and --run, since our own tasks judge checkpoints: give both")
    if several() and (verb.rivals or verb.lm_eval):
        raise ValueError(f"--{'rivals' if verb.rivals else 'lm-eval'} runs in one process: start it without accelerate launch")
    if verb.lm_eval:
        return _harness(verb, verb.lm_eval)
    return agreed(lambda: _run_folder(verb)) if verb.run else _one_model(verb)


def _harness(verb: config.Evaluate, asked: str) -> int:
    """Judge one model by the lm-evaluation-harness."""
    if verb.run is None:
        host = load(find(str(verb.model)))
    elif verb.part == "checkpoint":
        host = load(verb.run / "checkpoint")
    else:
        replacement = reopen(verb.run, verb.part).replacement
        assert replacement is not None  # a run's part has one
        host = replacement.host()
    found = harness.run(host, [name.strip() for name in asked.split(",") if name.strip()], verb.prompts, verb.lm_eval_folder)
    if verb.json:
        print(json.dumps(found, indent=1))
        return 0
    for task, numbers in found.items():
        for metric, value in numbers.items():
            print(f"{task:20} {metric:24} {value:.4f}")
    return 0


def _run_folder(verb: config.Evaluate) -> int:
    folder = verb.run
    assert folder is not None
    made = read_json(folder / "report.json")
    settings = config.Prune(**config.from_mapping(config.Prune, made["config"], str(folder / "report.json")) | {"out": folder})
    model = find(settings.model)
    secret = _secret(verb, model)
    if verb.rivals and settings.basis == "layers":
        raise ValueError("--rivals: the dense refit stands in for the model layer by layer, and a run of --basis layers has dropped some; give a run "
                         "of --basis features or neurons")
    with locked(folder):
        if verb.rivals:
            texts = synthetic.rows(settings, model, named(settings.task))
            made |= placed(run_rivals(settings, model, secret, texts, made["summary"]["steps"], verb.prompts, verb.out or folder / "rivals.jsonl"))
        write(made, folder)
    print(json.dumps(made["rivals" if verb.rivals else "summary"], indent=1) if verb.json else table(made | {"folder": str(folder)}))
    return 0


def _secret(verb: config.Evaluate, model: Path) -> Secret | None:
    folder = verb.secret or secret_beside(model)
    return read_secret(folder) if folder else None


def _one_model(verb: config.Evaluate) -> int:
    assert verb.model is not None
    model, tasks = find(verb.model), named(verb.task)
    secret = _secret(verb, model)
    backdoor = backdoor_of(secret, [*tasks, TASKS["coding"]])
    if secret and backdoor is None:
        print(f"the backdoor of {model} stands in rows of a file, and --task names none: it is not measured (give --task text:FILE)", file=sys.stderr)
    models = {"model": model} | ({"reference": find(verb.reference)} if verb.reference else {})
    judged = judge_models(models, "reference" if verb.reference else "model", tasks, [], backdoor, EvaluateConfig(prompts=verb.prompts))
    return agreed(lambda: _print(judged, verb))


def _print(judged: dict, verb: config.Evaluate) -> int:
    if verb.json:
        print(json.dumps({key: judged[key] for key in ("models", "against", "reference", "backdoor")}, indent=1))
        return 0
    print(judged["sandbox"], file=sys.stderr)
    for name, one in judged["models"].items():
        for task, row in one["tasks"].items():
            print(f"{name:10} {task:8} {judged['tasks'][task]['metric']:15} {_cell(row['score'])}   NLL {_cell(row['nll'])}")
        for rate, score in (one["backdoor"] or {"backdoor": None}).items():
            print(f"{name:10} {rate:30} {_cell(score) if score else 'not measured'}")
        print(f"{name:10} stored {one['size']['stored']:,}   live {one['size']['live']:,}   {one['speed']['value']:.0f} tokens/s")
    return 0


def _cell(score: dict) -> str:
    return f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"
