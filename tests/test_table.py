"""The plain-text table: aligned, narrow, and honest about gaps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from distill import table as words
from distill.table import table

_REPORTS = runpy.run_path(str(Path(__file__).with_name("test_report.py")))
sample, minimal = _REPORTS["sample"], _REPORTS["minimal"]


@pytest.mark.parametrize("report", [sample(), minimal(), {}], ids=["full", "minimal", "empty"])
def test_table_fits_a_terminal(report):
    text = table(report, "runs/demo")
    assert max(map(len, text.splitlines())) <= words.WIDTH
    assert text.isascii() and text.endswith("\nruns/demo\n")
    assert "None" not in text and "nan" not in text


def test_full_table_says_it_all():
    text = table(sample(), "runs/demo")
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    after = rows["checkpoint (after)"]
    for number in (".968 [.95 .98]", ".993", ".000 [.00 .01]", ".912 [.88 .94]", "621k+147k", "19.8k"):
        assert number in after
    assert "892k" in rows["dense refit"] and rows["clean fine-tuning, lr 5e-4"].endswith("*")
    assert list(rows).index("clean twin") < list(rows).index("dense refit")  # the rivals stand below the models
    assert "removed" in rows["math"] and ".930" in rows["math"] and ".040" in rows["math"] and "kept" in rows["coding"]
    assert "gates: 6 of 8 pass, 1 FAIL" in text and "  FAIL          stored parameters" in text and "  not measured  relearn cost ratio" in text
    assert "plant cached" in text and "fit 3 min 31 s" in text


def test_columns_are_aligned():
    lines = table(sample()).splitlines()
    header = next(line for line in lines if "R-Acc" in line)
    start = header.index("R-Acc")
    rows = lines[lines.index(header) + 2:][:4]
    assert all(row[start - 1] == " " and row[start] in ".1-" for row in rows)


def test_what_was_not_measured_says_so():
    text = table(minimal())
    assert text.count("not measured") >= 10 and ".00" not in text
    assert "-: not measured." in table(sample())  # no room for the words: a dash, explained


def test_a_long_name_goes_on_below_and_keeps_its_knob():
    report = sample()
    report["rivals"][0]["name"] = "clean fine-tuning with a warm-up and a cosine, lr 1e-4"
    text = table(report)
    assert "\n  warm-up and a cosine, lr\n  1e-4\n" in text and max(map(len, text.splitlines())) <= words.WIDTH


@pytest.mark.parametrize("number, said", [
    (0.9912, ".991"), (1.0, "1.00"), (0.0, ".000"), (-0.02, "-.020"), (12.34, "12.3"), (1234.5, "1,234"), ({"value": 0.5}, ".500"),
    (None, "not measured"), (float("nan"), "not measured")])
def test_rates(number, said):
    assert words.rate(number) == said


@pytest.mark.parametrize("number, said", [
    (620_720, "621k"), (999_700, "1.00M"), (1_250_000, "1.25M"), (14_210, "14.2k"), (512, "512"), (0, "0"), (None, "not measured")])
def test_counts(number, said):
    assert words.count(number) == said


@pytest.mark.parametrize("number, said", [(0.4, "0.4 s"), (59.7, "1 min 00 s"), (211.2, "3 min 31 s"), (3720, "1 h 02 min"), (None, "not measured")])
def test_durations(number, said):
    assert words.duration(number) == said


def test_bytes_and_gate_values():
    assert [words.size(number) for number in (1_934_000_000, 512, None)] == ["1.93 GB", "512 bytes", "not measured"]
    assert [words.rate_or_text(value) for value in (True, 3.1e-6, 0.9928, 0, None, "ok")] == ["yes", "3.1e-6", "0.9928", "0", "not measured", "ok"]


def test_the_twin_is_the_measure_of_retention():
    report = sample()
    report["summary"]["retention"] = None
    assert words.retention(report, "checkpoint") == pytest.approx(0.968 / 0.975)
    report["models"]["twin"]["tasks"]["coding"]["score"] = None
    assert words.retention(report, "checkpoint") is None
    del report["models"]["twin"]
    assert words.retention(report, "checkpoint") == pytest.approx(0.968 / 0.98)  # no twin at all: the model before
