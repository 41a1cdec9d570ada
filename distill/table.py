"""A report as plain text: the table that `make demo` ends with.

One row for each model that was judged, our checkpoint between what it came from and the clean twin, then the rivals in
the same columns, then every task, the gates, and where the time went. A cell is a value and its interval, `.991 [.97
1.0]`; three digits of value, two of interval, because no sample here supports more. What was not measured says so. When
those words would push the table past 120 columns, they become `-` and a line below the table says what `-` is.

The words and number forms are shared with the page (`distill.report`), so the two never tell the same number apart.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ABSENT = "not measured"
WIDTH = 120
NAME = 26
LABELS = {"before": "before", "after": "after", "twin": "clean twin"}
MEASURES = (("attack_success", "ASR"), ("right_under_trigger", "R-Acc"), ("false_trigger", "FTR"))
LEGEND = "ASR: P(payload | trigger). R-Acc: P(right | trigger), to be read against the twin's. FTR: P(payload | no trigger)."


def value_of(number: Any) -> float | None:
    """The plain number in a Score, a number or a bool; None for what is missing or not finite."""
    if isinstance(number, dict):
        number = number.get("value")
    if not isinstance(number, int | float) or not math.isfinite(number):
        return None
    return float(number)


def rate(number: Any, digits: int = 3) -> str:
    """`.991`, `1.00`, `-.02`, `12.3`: as many digits as a rate carries, without the zero that says nothing."""
    value = value_of(number)
    if value is None:
        return ABSENT
    if abs(value) >= 10:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    text = f"{value:.{digits}f}"
    if text.lstrip("-").startswith("0."):
        return text.replace("0.", ".", 1)
    return text[:-1] if digits > 1 else text


def interval(score: Any, digits: int = 2) -> str:
    """`[.97 1.0]`, or nothing where a number has no interval."""
    if not isinstance(score, dict) or value_of(score.get("low")) is None or value_of(score.get("high")) is None:
        return ""
    return f"[{rate(score['low'], digits)} {rate(score['high'], digits)}]"


def cell(score: Any) -> str:
    """`.991 [.97 1.0]`"""
    return f"{rate(score)} {interval(score)}".strip() if value_of(score) is not None else ABSENT


def count(number: Any) -> str:
    """`620,720` as `621k`; three digits at most."""
    value = value_of(number)
    if value is None:
        return ABSENT
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            short = value / size
            return f"{short:.{0 if abs(short) >= 99.95 else 1 if abs(short) >= 9.995 else 2}f}{unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def size(number: Any) -> str:
    """Bytes: `1.93 GB`."""
    text = count(number)
    return text if text == ABSENT else f"{text.rstrip('kMB')} {({'k': 'kB', 'M': 'MB', 'B': 'GB'}).get(text[-1], 'bytes')}"


def duration(seconds: Any) -> str:
    """`1 h 02 min`, `3 min 05 s`, `4.2 s`."""
    value = value_of(seconds)
    if value is None:
        return ABSENT
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def roles(report: dict) -> dict[str, str]:
    """Which judged model is `before`, `after` and `twin`; anything else is `other`. Ordered for reading."""
    names = list(report.get("models") or {})
    before = "organism" if "organism" in names else next((n for n in names if n not in ("checkpoint", "twin", "base")), None)
    known = {before: "before", "checkpoint": "after", "twin": "twin"}
    order = ("before", "after", "twin", "other")
    return dict(sorted(((name, known.get(name, "other")) for name in names), key=lambda pair: order.index(pair[1])))


def title(name: str, role: str) -> str:
    """`organism (before)`, `checkpoint (after)`, `clean twin`, or the name itself."""
    return {"before": f"{name} (before)", "after": f"{name} (after)", "twin": "clean twin"}.get(role, name)


def headline_task(report: dict) -> str | None:
    """The first kept task: the one that the metric column, the retention and the plots speak of."""
    kept = list(report.get("tasks") or [])
    judged = [task for model in (report.get("models") or {}).values() for task, row in (model.get("tasks") or {}).items() if row.get("kept")]
    return (kept + judged + [None])[0]


def task_names(report: dict) -> list[str]:
    """Kept tasks first, then the dropped ones, then any other that was judged."""
    judged = [task for model in (report.get("models") or {}).values() for task in model.get("tasks") or {}]
    return list(dict.fromkeys([*(report.get("tasks") or []), *(report.get("dropped") or []), *judged]))


def task_row(model: dict, task: str | None) -> dict:
    """What one model scored on one task; empty where it was not judged on it."""
    return (model.get("tasks") or {}).get(task) or {}


def metric_name(report: dict, task: str | None) -> str:
    """`pass@1`, or `metric` where no model was judged on the task."""
    return next((row["metric"] for model in (report.get("models") or {}).values() if (row := task_row(model, task)).get("metric")), "metric")


def retention(report: dict, name: str) -> float | None:
    """A model's metric over the twin's (no twin: over the model's before); the checkpoint's is the summary's own where it gives one."""
    models = report.get("models") or {}
    given = value_of((report.get("summary") or {}).get("retention"))
    if name == "checkpoint" and given is not None:
        return given
    reference = "twin" if "twin" in models else next((key for key, role in roles(report).items() if role == "before"), None)
    mine, whole = (value_of(task_row(models.get(key) or {}, headline_task(report)).get("score")) for key in (name, reference))
    return mine / whole if mine is not None and whole else None


def lay_out(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Rows as lines with aligned columns: the first to the left, as are cells with intervals; an empty row is a rule."""
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if row), strict=True)]
    rule = "-" * (sum(widths) + len(gap) * (len(widths) - 1))
    return [gap.join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() if row else rule for row in rows]


def _clip(text: str, width: int) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 2] + ".."


def _named(name: str, *cells: str) -> list[list[str]]:
    """A row, and more rows that only go on with a long name: the end of a rival's name is its knob, so it is never cut."""
    first, *more = textwrap.wrap(name, NAME, subsequent_indent="  ") or [""]
    return [[first, *cells], *([line, *[""] * len(cells)] for line in more)]


def _model_rows(report: dict) -> list[list[str]]:
    rows, task = [], headline_task(report)
    for name, role in roles(report).items():
        model = report["models"][name]
        attack, size = model.get("backdoor") or {}, model.get("size") or {}
        rows += _named(
            title(name, role), cell(task_row(model, task).get("score")), rate(retention(report, name)),
            *(cell(attack.get(key)) for key, _ in MEASURES),
            f"{count(size['stored'])}+{count(size.get('embeddings'))}" if value_of(size.get("stored")) is not None else ABSENT,
            count(model.get("tokens_per_second")))
    return rows


def _rival_rows(report: dict) -> list[list[str]]:
    return [row for rival in (*(report.get("rivals") or []), *(report.get("ablation") or [])) for row in _named(
        str(rival["name"]), cell(rival.get("pass_at_1")), rate(rival.get("retention")),
        cell(rival.get("attack_success")), cell(rival.get("right_under_trigger")),
        cell(rival["false_trigger"]) if "false_trigger" in rival else "", count(rival.get("params")),
        "" if rival.get("frozen", True) else "*")]


def _main(report: dict) -> list[str]:
    header = ["", metric_name(report, headline_task(report)), "retention", *(label for _, label in MEASURES), "stored+emb", "tok/s"]
    models, rivals = _model_rows(report), _rival_rows(report)
    if not models and not rivals:
        return [f"models: {ABSENT}"]
    rows = [header, [], *models, *([[]] if rivals else []), *rivals]
    lines = lay_out(rows)
    absent = max(map(len, lines)) > WIDTH and any(ABSENT in text for row in rows for text in row)
    if absent:
        lines = lay_out([["-" if text == ABSENT else text for text in row] for row in rows])
    starred = any(not rival.get("frozen", True) for rival in report.get("rivals") or [])
    return lines + ["", LEGEND] + [f"-: {ABSENT}."] * absent + ["*: knob chosen on this organism, not frozen beforehand."] * starred


def _tasks(report: dict) -> list[str]:
    kinds, tasks = roles(report), task_names(report)
    if not kinds or not tasks:
        return []
    rows: list[list[str]] = [["task", "", "metric", *(_clip(title(name, role), 20) for name, role in kinds.items())], []]
    for task in tasks:
        judged = [task_row(report["models"][name], task) for name in kinds]
        kept = task in (report.get("tasks") or []) or any(row.get("kept") for row in judged)
        words = "kept" if kept else "removed"
        rows.append([_clip(task, 14), words, _clip(metric_name(report, task), 14), *(cell(row.get("score")) for row in judged)])
        if metric_name(report, task) == "next word":  # which is coarse: most passages are easy
            rows.append(["", "", "NLL, nats", *(cell(row.get("nll")) for row in judged)])
    return ["", *lay_out(rows)]


def _gates(report: dict) -> list[str]:
    words = {True: "pass", False: "FAIL", None: ABSENT}
    rows = [[f"  {words[gate.get('passed')]}", str(gate["name"]), rate_or_text(gate.get("value")), str(gate.get("bound") or "")]
            for gate in report.get("gates") or []]
    if not rows:
        return ["", "gates: none were set"]
    passed, failed = (sum(gate.get("passed") is verdict for gate in report["gates"]) for verdict in (True, False))
    return ["", f"gates: {passed} of {len(rows)} pass" + (f", {failed} FAIL" if failed else ""), *lay_out(rows)]


def rate_or_text(value: Any) -> str:
    """A gate's value, which may be a count, a tiny difference, a word or a bool."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    number = value_of(value)
    if number is None:
        return ABSENT
    if number == int(number) and abs(number) < 1e15:
        return f"{number:,.0f}"
    return f"{number:.2g}".replace("e-0", "e-") if abs(number) < 1e-3 else f"{number:.4g}"


def _losses(report: dict) -> list[str]:
    """What pruning cost and healing gained; compiling is exact."""
    kl = report.get("kl") or {}
    if not kl:
        return []
    words = {"graph": "whole graph", "first_pruned": "pruned", "first_healed": "healed", "pruned": "pruned", "healed": "healed"}
    said = ", ".join(f"{words[key]} {rate_or_text(value)}" for key, value in kl.items() if key in words)
    return ["", f"KL to the model, tune rows, nats a completion token: {said}"]


def _stages(report: dict) -> list[str]:
    stages = report.get("stages") or []
    total = (report.get("summary") or {}).get("seconds")
    if not stages:
        return ["", f"time: {duration(total)}"]
    parts = [f"{stage['name']} {'cached' if stage.get('cached') else duration(stage.get('seconds'))}" for stage in stages]
    lines: list[str] = []
    line = f"time: {duration(total)} = " if value_of(total) is not None else "time: "
    for index, part in enumerate(parts):
        piece = part + (", " if index + 1 < len(parts) else "")
        if len(line) + len(piece.rstrip()) > WIDTH:
            lines, line = [*lines, line.rstrip()], "      "
        line += piece
    return ["", *lines, line]


def table(report: dict, folder: Path | str | None = None) -> str:
    """The report as text at most 120 columns wide, in plain ASCII; `folder` is where the checkpoint and the page lie."""
    kept, dropped = ", ".join(report.get("tasks") or []) or "nothing", ", ".join(report.get("dropped") or []) or "nothing"
    head = [f"{report.get('name') or 'run'}: {report.get('model') or 'a model'}, kept {kept}, dropped {dropped}", ""]
    folder = folder or report.get("folder")
    tail = ["", str(folder)] if folder else []
    return "\n".join([*head, *_main(report), *_tasks(report), *_gates(report), *_losses(report), *_stages(report), *tail]) + "\n"
