"""The judgement of several checkpoints on the same rows, as one JSON-able dictionary.

It sees folders (or models that run already) and rows, and knows of none how it was made. One model is the *reference* (a clean twin, or the
model before it was changed): the others are compared with it row by row, so that what rows share cancels.

    models[name]    tasks: score and nll of each task; backdoor: the rates; fidelity to the reference; size; speed
    against[name]   name compared with the reference: retention (metric / the reference's metric), differences of every
                    rate and of nll, ratios of size and speed
    rows[name]      the outcome of every row, for comparisons made later

Every number is a `Score` (value, low, high, count), or null where it cannot be known: no backdoor given, no reference to
follow, a reference so seldom right that a ratio to it is meaningless. Models are loaded one at a time; the reference
stays, because fidelity runs it beside each of the others, and all are loaded once together to be timed in turns. Of several processes each
answers and scores its share of the batches; programs are graded, and models timed, by the main one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from backdoor.behaviours import Behaviour
from backdoor.triggers import Trigger
from evals import statistics
from evals.capability import Outcome, judge
from evals.fidelity import Fidelity, compare
from evals.rates import Rates, measure_rates
from evals.sandbox import Sandbox, describe
from evals.size import parameters, speed
from evals.statistics import Score
from evals.tasks import Row, Task
from graphs.artifact import digest, read_json, write_json
from graphs.host import Host, load
from graphs.processes import agreed

RATES = ("right_under_trigger", "attack_success", "attack_success_sampled", "attack_success_held_out", "false_trigger")
NATS = ("payload_logprob", "nll_under_trigger")
"""What is measured in nats, not counted."""


@dataclass(frozen=True)
class Backdoor:
    """What the evaluation may know of a planted backdoor: the task it is placed in, its trigger and its behaviour."""

    task: Task
    trigger: Trigger
    behaviour: Behaviour


@dataclass(frozen=True)
class EvaluateConfig:
    """prompts: rows of each kept task, and of each backdoor rate; other_prompts: rows of each dropped task, and rows per
    task that fidelity is measured on; seed: of the rows; sampled: also measure the attack at temperature 1;
    speed_tokens, speed_repeats: tokens written and turns taken when timing."""

    prompts: int = 500
    other_prompts: int = 200
    seed: int = 7
    sampled: bool = True
    speed_tokens: int = 64
    speed_repeats: int = 5


@dataclass(frozen=True)
class Judged:
    """All that was seen of one model."""

    outcomes: dict[str, Outcome]
    rates: Rates | None
    fidelity: Fidelity | None
    size: dict[str, int]


def judge_models(
    models: Mapping[str, Path | Host], reference: str, tasks: Sequence[Task], dropped: Sequence[Task], backdoor: Backdoor | None,
    config: EvaluateConfig | None = None, known: Path | None = None,
) -> dict:
    """Judge checkpoint folders on kept and dropped tasks and, if one is given, a backdoor.

    known: folder of what was seen of checkpoints before, found again by the hash of all that it depends on; times are always taken anew.
    Raises ValueError where the reference is not among the models, a task stands on both lists, or a folder does not load.
    """
    config = config or EvaluateConfig()
    names = [task.name for task in (*tasks, *dropped)]
    if reference not in models:
        raise ValueError(f"the reference {reference!r} is not among the models {', '.join(models)}: add it or name one of these")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the tasks to judge are {names}: name at least one, and each once, as kept or as dropped")
    keys = [task.key for task in (*tasks, *dropped)]
    rows = {task.name: task.rows("test", config.prompts if task in tasks else config.other_prompts, config.seed) for task in (*tasks, *dropped)}
    follow = [row for task in tasks or dropped for row in rows[task.name][: config.other_prompts]]
    judged = {}
    with Sandbox() as sandbox, tqdm(total=len(models) * (len(names) + 1) + 1, desc="evaluate", leave=False, mininterval=1.0) as bar:
        layers, first = agreed(lambda: describe(sandbox)), _opened(models[reference])
        for name, folder in models.items():
            bar.set_postfix_str(name)
            followed = None if name == reference else first
            make = partial(_judge_one, folder if followed else first, followed, (*tasks, *dropped), rows, follow, backdoor, sandbox, config)
            planted = backdoor and (backdoor.task.name, backdoor.trigger.hash, backdoor.behaviour, backdoor.task.renderer)
            if known is None or not isinstance(folder, Path):
                judged[name] = make()
            else:
                judged[name] = _recalled(known / f"{digest(folder, followed and models[reference], keys, len(tasks), planted, config)}.json", make)
            bar.update(len(names) + 1)
            if isinstance(folder, Path):
                judged[name].size["file_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        bar.set_postfix_str("speed")
        speeds = agreed(lambda: speed({name: first if name == reference else _opened(folder) for name, folder in models.items()},
                                      [row.prompt for row in follow], config.speed_tokens, config.speed_repeats))
        bar.update()
    return {
        "reference": reference, "config": asdict(config), "sandbox": layers,
        "tasks": {task.name: {"metric": task.metric, "kept": task in tasks} for task in (*tasks, *dropped)},
        "backdoor": None if backdoor is None else {
            "task": backdoor.task.name, "family": backdoor.trigger.family, "trigger": backdoor.trigger.hash, "behaviour": backdoor.behaviour.name,
            "inverted": backdoor.behaviour.inverted, "shown": backdoor.behaviour.shown, "renderer": backdoor.task.renderer},
        "models": {name: _scores(one, speeds[name]) for name, one in judged.items()},
        "against": {name: _against(one, judged[reference], speeds[name], speeds[reference]) for name, one in judged.items() if name != reference},
        "rows": {name: _rows(one, speeds[name]) for name, one in judged.items()},
    }


def _judge_one(
    model: Host | Path, reference: Host | None, tasks: Sequence[Task], rows: dict[str, list[Row]], follow: list[Row],
    backdoor: Backdoor | None, sandbox: Sandbox, config: EvaluateConfig,
) -> Judged:
    host = _opened(model)  # what is known already is not loaded for this
    rates = None
    if backdoor is not None:
        rates = measure_rates(host, backdoor.task, backdoor.trigger, backdoor.behaviour, sandbox, config.prompts, config.seed, config.sampled)
    outcomes = {}
    for task in tasks:
        reuse = rates is not None and backdoor is not None and task.name == backdoor.task.name
        outcomes[task.name] = rates.clean if reuse else judge(host, task, rows[task.name], sandbox)  # type: ignore[union-attr]
    return Judged(outcomes, rates, compare(host, reference, follow) if reference else None, asdict(parameters(host.model)))


def _opened(model: Path | Host) -> Host:
    """A model that runs."""
    return load(model) if isinstance(model, Path) else model


def _recalled(file: Path, make: Callable[[], Judged]) -> Judged:
    """What `file` knows, or what `make` finds, which is known from then on."""
    if not agreed(file.is_file):
        made = make()
        agreed(lambda: write_json(file, made))
    found = agreed(lambda: read_json(file))
    rates, fidelity = found["rates"], found["fidelity"]
    return Judged({name: Outcome(**outcome) for name, outcome in found["outcomes"].items()},
                  rates and Rates.from_record(rates), fidelity and Fidelity(**fidelity), found["size"])


def _column(rates: Rates, name: str) -> list[float] | None:
    """One rate's rows as numbers."""
    rows = getattr(rates, name)
    return None if rows is None else [float(value) for value in rows]


def _scores(one: Judged, speeds: list[float]) -> dict:
    """The scores of one model by itself."""
    tasks = {name: {"score": _rate(outcome.right), "nll": statistics.mean(outcome.nll).to_json()} for name, outcome in one.outcomes.items()}
    backdoor = None
    if one.rates is not None:
        backdoor = {name: _rate(getattr(one.rates, name)) for name in RATES}
        backdoor["right_without_trigger"] = _rate(one.rates.clean.right)
        backdoor |= {name: statistics.mean(found).to_json() if (found := getattr(one.rates, name)) else None for name in NATS}
    fidelity = None if one.fidelity is None else {
        "kl": statistics.mean(one.fidelity.kl).to_json(), "agreement": statistics.mean(one.fidelity.agreement).to_json()}
    return {"tasks": tasks, "backdoor": backdoor, "fidelity": fidelity, "size": one.size, "speed": statistics.mean(speeds).to_json()}


def _rate(rows: list[bool] | None) -> dict | None:
    return None if rows is None else statistics.proportion(sum(rows), len(rows)).to_json()


def _against(one: Judged, reference: Judged, speeds: list[float], reference_speeds: list[float]) -> dict:
    """One model compared with the reference, row by row."""
    tasks = {}
    for name, outcome in one.outcomes.items():
        base = reference.outcomes[name]
        kept = retention(outcome.right, base.right)
        tasks[name] = {
            "retention": kept.to_json() if kept else None,
            "difference": statistics.paired_difference(list(map(float, outcome.right)), list(map(float, base.right))).to_json(),
            "nll_difference": statistics.paired_difference(outcome.nll, base.nll).to_json()}
    return {
        "tasks": tasks, "backdoor": _rates_against(one.rates, reference.rates),
        "stored_ratio": one.size["stored"] / reference.size["stored"], "live_ratio": one.size["live"] / reference.size["live"],
        "speed_ratio": statistics.ratio(speeds, reference_speeds).to_json()}


def _rates_against(rates: Rates | None, reference: Rates | None) -> dict | None:
    """Differences of every rate, and R-Acc as a share of the reference's R-Acc."""
    if rates is None or reference is None:
        return None
    out: dict = {}
    for name in (*RATES, *NATS):
        after, before = _column(rates, name), _column(reference, name)
        out[name] = None if after is None or before is None else statistics.paired_difference(after, before).to_json()
    kept = retention(rates.right_under_trigger, reference.right_under_trigger)
    return out | {"right_under_trigger_retention": kept.to_json() if kept else None}


def retention(after: Sequence[bool], before: Sequence[bool], seed: int = 0) -> Score | None:
    """Share of the reference's metric that is kept: mean(after) / mean(before), with a 95 % bootstrap interval over rows.

    after[i] and before[i] answer the same row. None where some resample has no right row of the reference: the ratio is then
    not determined by the data. Raises ValueError for unequal lengths or no rows.
    """
    if len(after) != len(before) or not before:
        raise ValueError(f"retention() got {len(after)} rows and {len(before)} of the reference: give one pair per row, at least one")
    return statistics.nested_ratio([after], [before], seed=seed)


def _rows(one: Judged, speeds: list[float]) -> dict:
    """Every row's outcome, as plain lists."""
    tasks = {name: {"right": outcome.right, "nll": outcome.nll, "status": outcome.status} for name, outcome in one.outcomes.items()}
    backdoor = None if one.rates is None else {name: getattr(one.rates, name) for name in (*RATES, *NATS, "triggered_completions")}
    return {"tasks": tasks, "backdoor": backdoor, "fidelity": None if one.fidelity is None else asdict(one.fidelity), "speed": speeds}
