"""`distill monitor`: learn from clean text how a model's nodes are driven, then say of each prompt how strangely they are.

    distill monitor fit --run RUN                         learns, sets the threshold on held-out clean rows, writes RUN/monitor
    distill monitor score --monitor RUN/monitor FILE      a JSON line for each prompt
    distill monitor serve --monitor RUN/monitor           the same, for lines on standard input, each answered as it comes
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from distill import config
from distill.models import find
from distill.prompts import lines, texts
from distill.report import visible
from distill.rows import batches, clean, tune_rows
from distill.runs import CLUSTER, Opened, inspected, settings_of
from evals.generate import prompt_ids
from evals.tasks import named
from graphs.artifact import digest, read_json, whole, write_json
from graphs.batches import Encoded, Epochs
from graphs.listening import passes
from graphs.monitor import PARTS, Monitor, fit

TIMED = 16
"""Prompts that fit times at once."""
Work = Callable[[Sequence[Sequence[int]]], object]
"""What is done with a batch of prompts."""


def run(verb: config.Monitor) -> int:
    """Fit, score or serve."""
    if verb.action == "fit":
        return _fit(verb)
    folder, opened = _folder(verb)
    monitor = Monitor.load(folder, opened.subject)
    found = sys.stdin if verb.action == "serve" or verb.prompts is None else lines(verb.prompts, "--prompts")
    for record in scored(monitor, opened, texts(found, "--prompts"), 1 if found is sys.stdin else 16):  # whoever writes there waits for an answer
        print(json.dumps(record), flush=True)
    return 0


def _fit(verb: config.Monitor) -> int:
    """Learn, calibrate, save."""
    where = verb.monitor or (verb.run / "monitor" if verb.model is None else None)
    if where is None:
        raise ValueError("monitor fit --model needs --monitor FOLDER: give one to write the monitor to")
    opened = inspected(verb)
    names = verb.task if verb.model is not None else settings_of(verb.run).task
    data, _ = sample_of(opened, clean(None, named(names)) if opened.data is None else [])
    steps = min(verb.rows, len(data.rows)) // CLUSTER
    monitor = fit(opened.subject, [data(step) for step in range(steps)], ahead=verb.ahead)
    held = [row.prompt for rows in tune_rows(named(names), verb.calibration).values() for row in rows]
    monitor = monitor.calibrate([one["score"] for one in scored(monitor, opened, held, 16)], verb.false_positives)
    size = min(TIMED, len(held))
    slow = watching(monitor, prompt_ids(opened.subject.host, held[: 4 * size]), size)["ratio"]
    facts = {"model": verb.model, "run": None if verb.model else str(verb.run.resolve()), "part": opened.part, "dictionaries": verb.dictionaries,
             "hook": verb.hook, "task": names, "weights": weights_of(opened, verb)}
    with whole(where) as out:
        monitor.save(out, facts)
        write_json(out / "receipt.json", {"key": digest(facts, verb.rows, verb.calibration, verb.ahead, opened.key), "config": verb})
    print(f"monitor in {where}: {monitor.learnt.tokens:,} clean tokens; threshold {monitor.threshold:.3f}, which a held-out clean prompt of this "
          f"kind passes with probability at most {monitor.rate:g} ({monitor.calibrated} calibration prompts); a score takes {slow:.2f} times as long "
          f"as the passes that it listens to, {size} prompts at a time")
    return 0


def watching(monitor: Monitor, rows: Sequence[Sequence[int]], size: int) -> dict[str, float]:
    """Seconds of scoring `size` prompts at a time, and of the same passes with nobody listening (`in_turns`)."""
    def plain(some: Sequence[Sequence[int]]) -> None:
        for _ in passes(monitor.subject.host, some, monitor.ahead):
            pass

    return in_turns(plain, monitor.score, [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)])


def in_turns(plain: Work, monitored: Work, batches: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
    """Median seconds of the processor that each takes, and the ratio of the second to the first."""
    times: dict[str, list[float]] = {"plain": [], "monitored": []}
    for some in batches:
        for name, work in (("plain", plain), ("monitored", monitored)):
            begin = time.process_time()
            work(some)
            times[name].append(time.process_time() - begin)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    return middle | {"ratio": middle["monitored"] / middle["plain"]}


def sample_of(opened: Opened, texts: Sequence[tuple[str, str]]) -> tuple[Epochs, list[Encoded]]:
    """The run's clean rows in clusters; of a bare model: `texts`."""
    if opened.data is None:
        return batches(opened.subject.host, texts, CLUSTER, 0)
    return Epochs(opened.data.rows, CLUSTER, opened.data.pad, opened.data.seed), list(opened.data.rows)


def weights_of(opened: Opened, verb: config.Monitor) -> str:
    """Hash of the model that is watched, and of the graph that it is watched by."""
    return digest(find(verb.model if verb.model is not None else settings_of(verb.run).model), opened.key)


def _folder(verb: config.Monitor) -> tuple[Path, Opened]:
    """The monitor's folder and the graph that it was fitted on, which it names itself."""
    folder = verb.monitor or verb.run / "monitor"
    if not (folder / "monitor.json").is_file():
        raise ValueError(f"--monitor {folder}: there is no monitor; run distill monitor fit first")
    facts = read_json(folder / "monitor.json")
    named_by = {"model": facts["model"], "dictionaries": facts["dictionaries"], "hook": facts["hook"]} if facts["model"] else {
        "run": Path(facts["run"]), "part": facts["part"]}
    wanted = config.Monitor(**named_by)
    opened = inspected(wanted)
    if weights_of(opened, wanted) != facts["weights"]:
        raise ValueError(f"--monitor {folder}: the model has changed since the monitor was fitted; run distill monitor fit again")
    return folder, opened


def scored(monitor: Monitor, opened: Opened, prompts: Iterable[str], size: int) -> Iterator[dict]:
    """One record a prompt, as soon as its batch of `size` is done."""
    waiting: list[str] = []
    for text in prompts:
        opened.ids(text, "--prompts")
        waiting.append(text)
        if len(waiting) == size:
            yield from _records(monitor, waiting)
            waiting = []
    if waiting:
        yield from _records(monitor, waiting)


def _records(monitor: Monitor, prompts: list[str]) -> Iterator[dict]:
    found = monitor.score(prompt_ids(monitor.subject.host, prompts), explain=monitor.calibrated > 0)
    for text, one in zip(prompts, found, strict=True):
        flagged = one.score > monitor.threshold
        yield {"prompt": text, "score": one.score, "flagged": flagged, "threshold": monitor.threshold,
               "tokens": [{"position": token.position, "score": token.score,
                           **dict(zip(PARTS, token.parts, strict=True))} for token in one.tokens],
               "reason": visible(one.reason.line()) if one.reason is not None and flagged else None}
