"""The report of a run: `report.json` for machines, `report.html` for people.

The page is one file that fetches nothing: styles, drawings and a little script stand in it, and its content policy
forbids the rest (the one script is allowed by its hash). `distill.drawing` turns a report into *geometry*, plain numbers
and words; this file adds what else the page needs, and the template `report.html.j2` draws it. So every text, and above
all what a model wrote, passes through the template's autoescape, and no markup is ever built from strings here.
"""

from __future__ import annotations

import base64
import hashlib
import math
import unicodedata
from pathlib import Path
from typing import Any

from distill import table
from distill.drawing import circuit_picture, loss_curves, rate_bars, scatter, size_curve, task_bars, time_split
from distill.table import ABSENT, value_of
from graphs.artifact import write_json, write_text


def by_prompt(report: dict) -> list[dict]:
    """Examples side by side: each prompt once, with every model's completion in the order of the models."""
    order = list(table.roles(report))
    groups: dict[str, dict] = {}
    for example in report.get("examples") or []:
        group = groups.setdefault(example["prompt"], {"prompt": example["prompt"], "triggered": example.get("triggered"), "answers": []})
        group["answers"].append(example)
    for group in groups.values():
        group["answers"].sort(key=lambda a: order.index(a["model"]) if a["model"] in order else len(order))
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------ the page


def visible(text: Any) -> str:
    """Text as it can be shown: control and direction-changing characters, which could disguise a completion, become marks."""
    shown = []
    for character in str(text).replace("\r\n", "\n"):
        kind = unicodedata.category(character)
        if character in "\n\t" or kind not in ("Cc", "Cf", "Cs"):
            shown.append(character)
        else:
            shown.append(chr(0x2400 + ord(character)) if ord(character) < 0x20 else f"<U+{ord(character):04X}>")
    return "".join(shown)


def percent(number: Any) -> str:
    """`99.1 %` with a space that does not break, never rounded to 0 % or 100 % unless it is."""
    value = value_of(number)
    if value is None:
        return ABSENT
    digits = 0 if value in (0.0, 1.0) else 1
    return f"{min(max(100 * value, 0.1), 99.9) if digits and 0 < value < 1 else 100 * value:.{digits}f}\u00a0%"


def environment() -> Any:
    """The templates of this folder, with autoescape and the filters that pages use."""
    from jinja2 import Environment, FileSystemLoader

    made = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {
        "rate": table.rate, "interval": table.interval, "count": table.count, "size": table.size, "duration": table.duration, "percent": percent,
        "gate": table.rate_or_text, "visible": visible, "measured": lambda number: value_of(number) is not None,
        "integrity": lambda script: base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()}
    return made


def page(report: dict) -> str:
    """The report as one offline HTML page."""
    full = {key: kind() for key, kind in _EMPTY.items()} | {key: value for key, value in report.items() if value is not None}
    for name, model in full["models"].items():
        full["models"] = full["models"] | {name: {"tasks": {}, "backdoor": None, "fidelity": None, "size": None, "tokens_per_second": None} | model}
    kinds = table.roles(full)
    return environment().get_template("report.html.j2").render(
        report=full, summary=_Gaps(full["summary"]), roles=kinds, titles={name: table.title(name, role) for name, role in kinds.items()},
        retention={name: table.retention(full, name) for name in kinds}, tasks=table.task_names(full), task=table.headline_task(full),
        metric={task: table.metric_name(full, task) for task in table.task_names(full)}, absent=ABSENT, bars=rate_bars(full),
        scatter=scatter(full), task_bars=task_bars(full), curve=size_curve(full), circuit=circuit_picture(full), losses=loss_curves(full),
        times=time_split(full), groups=by_prompt(full))


class _Gaps(dict):
    """A dict whose missing keys are None: not measured, rather than an error."""

    def __missing__(self, key: str) -> None:
        return None


_EMPTY = {key: dict for key in ("versions", "summary", "models", "fit", "losses", "circuit")} | {
    key: list for key in ("tasks", "dropped", "gates", "rivals", "curve", "stages", "examples", "ablation", "notes")} | {
    key: str for key in ("name", "command", "model", "commit")}


def _finite(value: Any) -> Any:
    """The same value with NaN and infinities as null, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(report: dict, folder: Path | str) -> Path:
    """Write report.json and report.html into `folder`, each whole or not at all; returns the page's path."""
    folder, text = Path(folder), page(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", _finite(report))
    write_text(folder / "report.html", text)
    return folder / "report.html"
