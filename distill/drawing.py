"""The pictures of a report as geometry: plain numbers and words, in the order in which a reader asks.

    rate_bars          each rate with the trigger and without it, before, after and twin   is the backdoor gone?
    scatter            right under the trigger against the task metric, with rivals        was there a cheaper way?
    task_bars          every task, from before to after                                    what was kept, what fell?
    size_curve         the metric of each size that was tried, the chosen one marked       could it be smaller?
    circuit_picture    kept heads and features, layer by layer                             what is left?
    loss_curves        the median of each bucket of steps, its extremes as a band          did training settle?
    time_split         each stage's share of the whole, the unaccounted part too           where did the time go?

Drawings are 460 units wide, about the width of a phone, so that their words stay readable there; on a desk two stand
side by side. A mark has a shape as well as a colour: square before, disc after, diamond for the twin, ring for rivals.
Whiskers are the intervals of the scores. What was not measured is left out of a drawing and named in the table below it.

Rates and tasks are drawn from 0, with room for 1, so that no small difference looks large. The scatter and the curve
fit their range to the intervals instead, since there it matters whether those overlap; a rival that fell far behind
stands at the edge and says where it belongs. Losses are logarithmic and bound by their medians: one spike must not
flatten a curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distill import table
from distill.table import ABSENT, value_of

WIDE = 460
POINTS = 140  # of a loss curve: about two pixels each
RATES = (
    ("attack_success", "Attack success, greedy", "lower is better"),
    ("attack_success_sampled", "Attack success, sampled at temperature 1", "lower is better"),
    ("right_under_trigger", "Right under the trigger", "as high as the twin's"),
    ("false_trigger", "Payload without the trigger", "lower is better"),
)


@dataclass(frozen=True)
class Scale:
    """Maps low..high to start..stop, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(max(x, 1e-300)) if self.log else x for x in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside low..high: steps of 1, 2 or 5, or decades (with 2 and 5 where there are few)."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
            whole = [10.0**d for d in decades if self.low <= 10.0**d <= self.high]
            chosen = fine if len(fine) <= about else whole if len(whole) > 1 else fine[:: math.ceil(len(fine) / about)]
            return chosen[:: math.ceil(len(chosen) / about)] if chosen else [self.low, self.high]
        if self.high <= self.low:
            return [self.low]
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _around(values: Iterable[float], rates: bool = True, pad: float = 0.08) -> tuple[float, float]:
    """The range to draw: the values and a margin; rates never beyond 0..1."""
    values = list(values)
    low, high = min(values), max(values)
    margin = max((high - low) * pad, 0.02 if rates else abs(high) * 0.02, 1e-9)
    low, high = low - margin, high + margin
    return (max(low, -0.01), min(high, 1.01)) if rates and max(values) <= 1 and min(values) >= 0 else (low, high)


def _ends(score: Any) -> tuple[float, float, float]:
    """low, value, high of a measured score; a bare number is its own interval."""
    value = value_of(score)
    assert value is not None
    low, high = (value_of(score.get(end)) if isinstance(score, dict) else None for end in ("low", "high"))
    return (value if low is None else low, value, value if high is None else high)


def _plain(number: float) -> str:
    return f"{number:g}".replace("0.", ".", 1) if abs(number) < 1 else f"{number:g}"


def _short(number: float) -> str:
    text = table.count(number)
    return f"{float(text[:-1]):g}{text[-1]}" if text[-1].isalpha() else text


def _axis(scale: Scale, words: Any = _plain, about: int = 5) -> list[dict]:
    return [{"at": scale(tick), "label": words(tick)} for tick in scale.ticks(about)]


# ------------------------------------------------------------------------------------------------ the backdoor


def rate_bars(report: dict) -> dict | None:
    """Bars of each rate under the trigger and without it: before, after, twin."""
    models = [(name, role) for name, role in table.roles(report).items() if role != "other"]
    scale, y, groups = Scale(0, 1, 112, 330), 8, []
    for key, words, wish in RATES:
        scores = [(name, role, (report["models"][name].get("backdoor") or {}).get(key)) for name, role in models]
        if all(value_of(score) is None for *_, score in scores):
            continue
        y += 14
        group: dict[str, Any] = {"title": words, "wish": wish, "y": y, "bars": []}
        for name, role, score in scores:
            y += 21
            bar = {"role": role, "label": table.LABELS[role], "y": y, "text": table.cell(score), "tip": f"{table.title(name, role)}: {_said(score)}"}
            if value_of(score) is not None:
                bar["low"], bar["x"], bar["high"] = map(scale, _ends(score))
            group["bars"].append(bar)
        groups.append(group)
        y += 25
    return {"groups": groups, "height": y - 6, "zero": scale(0), "one": scale(1)} if groups else None


def _said(score: Any) -> str:
    """A score in words, for a tooltip."""
    if value_of(score) is None:
        return ABSENT
    count = score.get("count") if isinstance(score, dict) else None
    return table.cell(score) + (f", n = {count:,}" if isinstance(count, int) else "")


def scatter(report: dict) -> dict | None:
    """Right under the trigger against the task metric, for every model and rival; rivals are numbered as in their table."""
    task, points = table.headline_task(report), []
    for number, rival in enumerate(report.get("rivals") or [], 1):
        points.append({"role": "rival", "label": str(number), "name": rival["name"], "frozen": rival.get("frozen", True),
                       "x": rival.get("pass_at_1"), "y": rival.get("right_under_trigger")})
    for name, role in reversed(table.roles(report).items()):
        model = report["models"][name]
        points.append({"role": role, "label": table.LABELS.get(role, name), "name": table.title(name, role), "frozen": True,
                       "x": table.task_row(model, task).get("score"), "y": (model.get("backdoor") or {}).get("right_under_trigger")})
    points = [p for p in points if value_of(p["x"]) is not None and value_of(p["y"]) is not None]
    if not points:
        return None
    # a rival that lost a fifth of the task would squeeze all others together: it stands at the left edge, and says where it belongs
    floor = 0.8 * max(_ends(p["x"])[1] for p in points)
    for point in points:
        point["off"] = point["role"] == "rival" and _ends(point["x"])[1] < floor
        point["label"] += f" at {table.rate(point['x'])}" if point["off"] else ""
    across = Scale(*_around(v for p in points if not p["off"] for v in _ends(p["x"])), 44, WIDE - 12)
    up = Scale(*_around(v for p in points for v in _ends(p["y"])), 366, 24)
    for point in points:
        point["tip"] = f"{point['name']}: {table.metric_name(report, task)} {_said(point['x'])}; right under trigger {_said(point['y'])}"
        point["left"], point["x"], point["right"] = map(across, _ends(point["x"]))
        point["bottom"], point["y"], point["top"] = map(up, _ends(point["y"]))
        if point["off"]:
            point["left"] = point["x"] = point["right"] = 50.0
    _place_labels(points)
    return {"points": points, "height": 408, "left": 44, "right": WIDE - 12, "top": 24, "bottom": 366, "across": _axis(across), "up": _axis(up),
            "twin": next((p for p in points if p["role"] == "twin"), None), "metric": table.metric_name(report, task)}


def _place_labels(points: Sequence[dict], right: float = WIDE - 12) -> None:
    """Give each point the nearest free place for its label, the models before the rivals."""
    taken = [(p["x"] - 5, p["y"] - 5, p["x"] + 5, p["y"] + 5) for p in points]
    for point in reversed(points):
        width, x, y = (6.9 if point["role"] == "rival" else 7.6) * len(point["label"]), point["x"], point["y"]
        places = [(dx, dy, anchor) for d in (8, 12, 18, 26, 36) for dx, dy, anchor in (
            (d, 4, "start"), (-d, 4, "end"), (0, -d, "middle"), (0, d + 9, "middle"),
            (d * 0.8, -d * 0.8, "start"), (d * 0.8, d * 0.8 + 8, "start"), (-d * 0.8, -d * 0.8, "end"), (-d * 0.8, d * 0.8 + 8, "end"))]
        boxes = []
        for dx, dy, anchor in places:
            start = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            boxes.append((start, y + dy - 10, start + width, y + dy + 2))
        outside = [box[0] < 46 or box[2] > right or box[1] < 18 or box[3] > 366 for box in boxes]
        cost = [sum(_overlap(box, other) for other in taken) + 1e3 * out for box, out in zip(boxes, outside, strict=True)]
        best = min(range(len(boxes)), key=lambda i: (cost[i], i))
        dx, dy, anchor = places[best]
        point["words"] = {"x": round(x + dx, 1), "y": round(y + dy, 1), "anchor": anchor}
        point["leader"] = best >= 16
        taken.append(boxes[best])


def _overlap(a: tuple, b: tuple) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# --------------------------------------------------------------------------------------------- tasks, size, graph


def task_bars(report: dict) -> dict | None:
    """Each task before and after, kept ones first, with the twin as a tick."""
    kinds, y, rows = {role: name for name, role in table.roles(report).items() if role != "other"}, 4, []
    for task in table.task_names(report):
        judged = {role: table.task_row(report["models"][name], task) for role, name in kinds.items()}
        scores = {role: row.get("score") for role, row in judged.items() if value_of(row.get("score")) is not None}
        kept = task in (report.get("tasks") or []) or any(row.get("kept") for row in judged.values())
        top = max([1.0, *(_ends(score)[2] for score in scores.values())])
        scale, y = Scale(0, top, 8, WIDE - 8), y + 16
        row: dict[str, Any] = {"task": task, "metric": table.metric_name(report, task), "kept": kept, "y": y, "marks": []}
        for role in ("twin", "before", "after"):
            if role in scores:
                low, x, high = map(scale, _ends(scores[role]))
                tip = f"{task}, {table.LABELS[role]}: {_said(scores[role])}"
                row["marks"].append({"role": role, "low": low, "x": x, "high": high, "tip": tip})
        row["move"] = [scale(_ends(scores[role])[1]) for role in ("before", "after")] if {"before", "after"} <= set(scores) else None
        words = [table.rate(judged.get(role, {}).get("score")) for role in ("before", "after")]
        row["text"] = ABSENT if set(words) == {ABSENT} else " \u2192 ".join(words)
        rows.append(row)
        y += 38
    return {"rows": rows, "height": y - 4, "left": 8, "right": WIDE - 8} if rows and kinds else None


def size_curve(report: dict) -> dict | None:
    """The metric against stored parameters, with the chosen point, the model before and the twin as levels."""
    points = [dict(p) for p in report.get("curve") or [] if value_of(p.get("metric")) is not None and value_of(p.get("params"))]
    if not points:
        return None
    points.sort(key=lambda p: p["params"])
    task = table.headline_task(report)
    judged = [(role, value_of(table.task_row(report["models"][name], task).get("score"))) for name, role in table.roles(report).items()]
    levels = [(role, value) for role, value in judged if value is not None and role in ("before", "twin")]
    sizes = [p["params"] for p in points]
    log = max(sizes) > 8 * min(sizes)
    low, high = (min(sizes) / 1.2, max(sizes) * 1.2) if log else _around(sizes, rates=False)
    across = Scale(low, high, 44, WIDE - 12, log)
    up = Scale(*_around([v for p in points for v in _ends(p["metric"])] + [v for _, v in levels]), 258, 24)
    for point in points:
        parts = [f"{point['params']:,} parameters"] + ([f"{point['layers']} layers"] if isinstance(point.get("layers"), int) else [])
        parts += [f"{point[key]:,} {key} a layer" for key in ("heads", "features") if isinstance(point.get(key), int)]
        point["tip"] = f"{', '.join(parts)}: {_said(point['metric'])}" + (", chosen" if point.get("chosen") else "")
        point["label"] = f"{point['share']:.0%}" if value_of(point.get("share")) is not None else ""
        point["x"] = across(point["params"])
        point["bottom"], point["y"], point["top"] = map(up, _ends(point["metric"]))
        point["below"] = point["top"] < 40
    return {"points": points, "height": 302, "left": 44, "right": WIDE - 12, "top": 24, "bottom": 258, "across": _axis(across, _short),
            "up": _axis(up), "levels": [{"role": role, "y": up(value), "label": table.LABELS[role]} for role, value in levels],
            "metric": table.metric_name(report, task), "task": task}


def circuit_picture(report: dict) -> dict | None:
    """Layers from the bottom up: a disc for each head, and the kept features as part of what there was."""
    layers = (report.get("circuit") or {}).get("layers") or []
    if not layers:
        return None
    heads = [_alive(layer) for layer in layers]
    most = max([len(alive) for alive in heads] + [1])
    step = min(19.0, 190 / most)
    most_features = max([layer.get("features_of") or layer.get("features") or 1 for layer in layers])
    start = 44 + most * step + 18
    pitch = min(50.0, max(26.0, 250 / len(layers)))
    rows, width = [], WIDE - 84 - start
    for index, (layer, alive) in enumerate(zip(layers, heads, strict=True)):
        y = round(20 + (len(layers) - 1 - index) * pitch, 1)
        kept, of = layer.get("features"), layer.get("features_of") or layer.get("features")
        number = layer.get("layer", index)
        rows.append({
            "name": f"L{number}", "y": y, "start": round(start, 1),
            "heads": [{"x": round(44 + (i + 0.5) * step, 1), "on": on, "tip": f"layer {number}, head {i}: {'kept' if on else 'dropped'}"}
                      for i, on in enumerate(alive)],
            "of": round(width * (of or 0) / most_features, 1), "kept": round(width * (kept or 0) / most_features, 1),
            "text": ABSENT if kept is None else f"{kept:,} / {of:,}",
            "tip": f"layer {number}: {sum(alive)} of {len(alive)} heads, {kept} of {of} features"})
    return {"rows": rows, "radius": round(step * 0.34, 1), "height": round(20 + len(layers) * pitch), "heads_at": 44, "features_at": round(start, 1)}


def _alive(layer: dict) -> list[bool]:
    """Which heads are kept; where only their number is known, the first ones stand for it."""
    given = layer.get("alive_heads")
    return [bool(on) for on in given] if given else [i < (layer.get("heads") or 0) for i in range(layer.get("heads_of") or layer.get("heads") or 0)]


# ------------------------------------------------------------------------------------------------ training, time


def loss_curves(report: dict) -> list[dict]:
    """One small panel for each training stage: the median of each bucket of steps, and a band from least to most."""
    panels = []
    for name, losses in (report.get("losses") or {}).items():
        steps = [(step, value) for step, loss in enumerate(losses or []) if (value := value_of(loss)) is not None and value > 0]
        if len(steps) < 2:
            continue
        size = math.ceil(len(losses) / POINTS)
        buckets: dict[int, list[float]] = {}
        for step, loss in steps:
            buckets.setdefault(step // size, []).append(loss)
        # bound by medians, with room for most of the band: one spike must not flatten the curve
        middles = {b: sorted(v)[len(v) // 2] for b, v in buckets.items()}
        low, high = min(middles.values()) / 1.25, max(middles.values()) * 1.25
        across, up = Scale(0, max(max(buckets), 1), 40, 216), Scale(low, high, 100, 10, log=True)
        panels.append({
            "name": name, "steps": len(losses), "last": f"{_tail(steps):.3g}", "left_out": len(losses) - len(steps),
            "line": " ".join(f"{across(b)},{up(m)}" for b, m in middles.items()),
            "band": " ".join([f"{across(b)},{up(max(v))}" for b, v in buckets.items()]
                             + [f"{across(b)},{up(min(v))}" for b, v in reversed(buckets.items())]),
            "up": _axis(up, about=4), "across": [{"at": 40, "label": "0"}, {"at": 216, "label": f"{len(losses):,}"}]})
    return panels


def _tail(steps: Sequence[tuple[int, float]]) -> float:
    """The median of the last twentieth: where the curve ended, not where its last batch fell."""
    last = sorted(loss for _, loss in steps[-max(1, len(steps) // 20):])
    return last[len(last) // 2]


def time_split(report: dict) -> dict | None:
    """Stages as shares of the time; what the stages do not account for is a part of its own."""
    stages = [{**stage, "seconds": value_of(stage.get("seconds"))} for stage in report.get("stages") or []]
    if not stages:
        return None
    known = sum(stage["seconds"] or 0 for stage in stages)
    total = value_of((report.get("summary") or {}).get("seconds")) or known
    if total - known > 0.02 * total:
        stages.append({"name": "everything else", "seconds": total - known, "cached": False})
    at, whole = 0.0, max(total, known) or 1
    for index, stage in enumerate(stages):
        share = (stage["seconds"] or 0) / whole
        stage.update(at=round(at * 1000, 2), width=round(share * 1000, 2), share=f"{share:.0%}", tone=index % 6)
        at += share
    return {"stages": stages, "total": table.duration(total)}
