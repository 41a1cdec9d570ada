"""The doctor: both verdicts of every check; each finding that is not ok has a remedy; only what is needed makes it fail."""

import json

import pytest
from packaging.requirements import Requirement

from distill import doctor
from distill.__main__ import main
from tests.test_readme import ROOT


def states(look) -> dict[str, str]:
    found = list(look())
    assert all((one.state == "ok") == (not one.remedy) for one in found)
    return {one.name: one.state for one in found}


def test_it_tries_everything_and_exits_by_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**10)
    status = main(["doctor", "--json", "--out", str(tmp_path / "runs" / "x")])
    said = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())  # it leaves nothing behind
    names = [one["name"] for one in said["findings"]]
    assert {"python", "packages", "cores", "threads", "memory", "devices", "out", "cache", "assets", "sandbox"} <= set(names)
    assert status == int(not said["ready"]) == int(any(one["state"] == "missing" for one in said["findings"]))
    for one in said["findings"]:
        assert one["says"] and (one["state"] == "ok") == (not one["remedy"]), one
    sandbox = next(one for one in said["findings"] if one["name"] == "sandbox")
    assert sandbox["facts"]["rate"] > 0 and "no_network" in sandbox["facts"]["layers"]


def quiet(monkeypatch):
    """All checks but those a test is about say ok."""
    def ok():
        yield doctor.Finding("sandbox", "ok", "", "")

    monkeypatch.setattr(doctor, "sandbox", ok)
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**10)


def test_a_place_that_cannot_be_written_fails_and_says_so(capsys, tmp_path, monkeypatch):
    quiet(monkeypatch)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", "/proc/nowhere/run"):
        assert main(["doctor", "--out", str(out)]) == 1
        said = capsys.readouterr().out
        assert "give --out a folder that you may write to" in said and said.strip().endswith("not ready: out")
    assert main(["doctor", "--out", str(tmp_path)]) == 0 and capsys.readouterr().out.strip().endswith("ready")


def test_notes_do_not_fail(capsys, tmp_path, monkeypatch):
    quiet(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "OMP_NUM_THREADS=512" in said and "export OMP_NUM_THREADS=" in said
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert states(doctor.threads) == {"threads": "ok"}


def test_packages_that_are_absent_or_too_old_are_missing(monkeypatch):
    assert states(doctor.packages) == {"packages": "ok"}
    for line in ("no-such-package>=1", "torch>=99"):
        monkeypatch.setattr(doctor, "requirements", lambda line=line: [Requirement(line)])
        assert states(doctor.packages) == {"packages": "missing"}
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement("no-such-package>=1; extra == 'lm-eval'")])
    assert states(doctor.packages) == {"packages": "ok"} and states(doctor.extras) == {"extras": "note"}
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement("torch; extra == 'lm-eval'")])
    assert states(doctor.extras) == {"extras": "ok"}


def test_requirements_are_read_from_the_source_tree_too(monkeypatch):
    ours = {(one.name, str(one.specifier)) for one in doctor.requirements()}
    monkeypatch.setattr(doctor, "PACKAGE", "not-installed-under-this-name")
    assert {(one.name, str(one.specifier)) for one in doctor.requirements()} == ours and ("torch", ">=2.13") in ours


def test_other_versions_than_the_pinned_are_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert states(doctor.pins) == {}  # an installed wheel has none
    for version, state in ((doctor.installed("torch").split("+")[0], "ok"), ("0.1", "note")):
        (tmp_path / "constraints.txt").write_text(f"torch=={version}\nnot-installed==3\n")
        assert states(doctor.pins) == {"pins": state}


@pytest.mark.parametrize(("free", "state"), [(10**10, "ok"), (10**8, "missing")])
def test_memory_and_disk_must_hold_a_run(monkeypatch, tmp_path, free, state):
    monkeypatch.setattr(doctor, "available_memory", lambda: free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: type("usage", (), {"free": free}))
    assert states(doctor.memory) == {"memory": state} and states(lambda: doctor.writable(tmp_path)) == {"out": state}


def test_the_memory_it_asks_for_is_what_the_default_command_was_measured_to_take():
    rows = [json.loads(line) for line in (ROOT / "results" / "summaries.jsonl").read_text().splitlines()]
    measured = next(row["summary"]["peak_rss_bytes"] for row in rows if row["name"] == "default")
    assert pytest.approx(measured, rel=0.1) == doctor.MEMORY


def test_a_busy_machine_is_a_note(monkeypatch):
    for load, state in ((0.1, "ok"), (99.0, "note")):
        monkeypatch.setattr(doctor.os, "getloadavg", lambda load=load: (load, load, load))
        assert states(doctor.cores) == {"cores": state}


def test_bf16_that_is_not_native_is_a_note(monkeypatch):
    for native, state in ((True, "ok"), (False, "note")):
        monkeypatch.setattr("graphs.train.native_bf16", lambda native=native: native)
        assert states(doctor.devices) == {"devices": state}


@pytest.mark.parametrize(("off", "state"), [((), "ok"), (("private_root",), "note"), (("no_network",), "missing")])
def test_the_sandbox_is_judged_by_its_layers(monkeypatch, off, state):
    from evals import sandbox

    monkeypatch.setattr(sandbox.Sandbox, "layers", lambda self: {name: name not in off for name in sandbox.PROTECTIONS})
    monkeypatch.setattr(sandbox, "measured_rate", lambda jails, count: 100.0)
    assert states(doctor.sandbox) == {"sandbox": state}


def test_a_sandbox_that_does_not_start_is_missing(monkeypatch):
    from evals import sandbox

    def fail(self):
        raise RuntimeError("evals/jail.py did not start")

    monkeypatch.setattr(sandbox.Sandbox, "layers", fail)
    assert states(doctor.sandbox) == {"sandbox": "missing"}


def test_lost_assets_and_a_broken_check_are_missing(monkeypatch, tmp_path):
    assert states(doctor.assets) == {"assets": "ok"}
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert states(doctor.assets) == {"assets": "missing"}
    quiet(monkeypatch)
    monkeypatch.setattr(doctor, "cores", lambda: 1 / 0)
    found = {one.name: one for one in doctor.examine(tmp_path)}
    assert found["cores"].state == "missing" and "ZeroDivisionError" in found["cores"].says and found["python"].state == "ok"


def test_a_cache_that_cannot_be_written_is_a_note(monkeypatch, tmp_path):
    import huggingface_hub.constants

    for folder, state in ((tmp_path / "new" / "hub", "ok"), ("/proc/nowhere/hub", "note")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        assert states(doctor.cache) == {"cache": state}
