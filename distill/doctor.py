"""`distill doctor`: what this machine can do, what is missing, and what to do about each.

A finding is *ok*, a *note* (something optional is absent, or will be slow or less exact) or *missing* (the default command cannot do its
work without it). Only the last makes the verb exit 1. What can be tried is tried: a program is graded in the sandbox, a file is written.
Nothing heavy is imported before it is known to be there, so that a broken installation can be looked at too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.config_doctor import Doctor

ROOT = Path(__file__).parent.parent
PACKAGE = "distill-circuits"
MEMORY = 2.9e9
"""Bytes that the default command holds at its peak (results/summaries.jsonl)."""
DISK = 5e8
"""Bytes that should be left: several times what a run of a model that ships takes."""
NEEDED = ("no_network", "no_new_privileges", "rlimits")
"""Layers of the sandbox without which a program that a model wrote could reach out, rise or fill the machine."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. says: what was found; remedy: one sentence, unless all is well; facts: the same for a program."""

    name: str
    state: Literal["ok", "note", "missing"]
    says: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def run(verb: Doctor) -> int:
    """Look, print, and return 1 where something needed is missing."""
    found = examine(verb.out)
    ready = all(one.state != "missing" for one in found)
    if verb.json:
        print(json.dumps({"ready": ready, "findings": [asdict(one) for one in found]}, indent=1))
    else:
        print(page(found, ready))
    return 0 if ready else 1


def page(found: list[Finding], ready: bool) -> str:
    """What a person reads."""
    lines = []
    for one in found:
        lines.append(f"{'' if one.state == 'ok' else one.state:8} {one.name:10} {one.says}")
        lines += [f"{'':8} {'':10} -> {one.remedy}"] if one.remedy else []
    return "\n".join([*lines, "", "ready" if ready else "not ready: " + ", ".join(one.name for one in found if one.state == "missing")])


def examine(out: Path) -> list[Finding]:
    """All findings; a check that itself fails is something missing."""
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", python), ("packages", packages), ("pins", pins), ("extras", extras), ("cores", cores), ("threads", threads), ("memory", memory),
        ("devices", devices), ("out", lambda: writable(out)), ("cache", cache), ("assets", assets), ("sandbox", sandbox)]
    found = []
    for name, look in looks:
        try:
            found += list(look())
        except Exception as error:  # whatever is broken here, the rest is still worth knowing
            found.append(Finding(name, "missing", f"cannot be looked at: {type(error).__name__}: {error}",
                                 "install the package again in a fresh virtual environment (make clean, then make check)"))
    return found


# ------------------------------------------------------------------------------------------------------ what is installed


def requirements() -> list[Any]:
    """What the package requires, from its own metadata, or from pyproject.toml where it was never installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        optional = project["optional-dependencies"]
        lines = [*project["dependencies"], *(f"{one}; extra == '{extra}'" for extra, ones in optional.items() for one in ones)]
    return [Requirement(line) for line in lines]


def installed(name: str) -> str | None:
    """The version of a distribution, where there is one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Iterator[Finding]:
    """The interpreter."""
    version, enough = platform.python_version(), sys.version_info >= (3, 11)
    yield Finding("python", "ok" if enough else "missing", f"{version} on {platform.system()} {platform.machine()}",
                  "" if enough else "Python 3.11 or newer is needed: make PYTHON=python3.12", {"version": version, "system": platform.system()})


def packages() -> Iterator[Finding]:
    """What must be installed, against the bounds that are declared."""
    wrong, have = [], {}
    for one in requirements():
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        have[one.name] = version = installed(one.name)
        if version is None or not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name}{one.specifier} (found {version or 'nothing'})")
    remedy = "pip install --constraint constraints.txt . installs them (the README names torch's CPU index)"
    yield Finding("packages", "missing" if wrong else "ok", "; ".join(wrong) or f"all {len(have)} required packages, torch {have.get('torch')}, "
                  f"transformers {have.get('transformers')}", remedy if wrong else "", {"versions": have})


def pins() -> Iterator[Finding]:
    """The versions that committed results were measured with; a wheel does not carry them."""
    file = ROOT / "constraints.txt"
    if not file.is_file():
        return
    pinned = dict(line.split("==", 1) for line in file.read_text().split() if "==" in line)
    off = {name: (version, here) for name, version in pinned.items() if (here := installed(name)) is not None and here.split("+")[0] != version}
    yield Finding("pins", "note" if off else "ok", ", ".join(f"{name} {here} (pinned {version})" for name, (version, here) in off.items())
                  or "every installed version is the pinned one",
                  "numbers may differ from the committed ones: pip install --constraint constraints.txt . restores them" if off else "",
                  {"other": {name: list(pair) for name, pair in off.items()}})


def extras() -> Iterator[Finding]:
    """Optional parts."""
    absent: dict[str, list[str]] = {}
    for one in requirements():
        for name in ("lm-eval", "dev"):
            if one.marker is not None and one.marker.evaluate({"extra": name}) and not installed(one.name):
                absent.setdefault(name, []).append(one.name)
    said = "; ".join(f"{name} is absent ({', '.join(ones)})" for name, ones in absent.items())
    remedy = " or ".join(f"pip install '{PACKAGE}[{name}]'" for name in absent)
    yield Finding("extras", "note" if absent else "ok", said or "lm-eval and dev are there", f"only if you want them: {remedy}" if absent else "",
                  {"absent": absent})


def assets() -> Iterator[Finding]:
    """The models and rows that ship."""
    folder = Path(__file__).parent / "assets"
    files = [f"{name}/model/model.safetensors" for name in ("organism", "organism-rare", "twin", "base", "base-small")]
    lost = [name for name in (*files, "clean_rows.parquet") if not (folder / name).is_file()]
    yield Finding("assets", "missing" if lost else "ok", f"not there: {', '.join(lost)}" if lost else "builtin models and clean rows",
                  "install the package again, or make assets" if lost else "", {"lost": lost})


# ------------------------------------------------------------------------------------------------------ what the machine has


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (words := quota.read_text().split())[0] != "max":
        count = min(count, max(1, round(int(words[0]) / int(words[1]))))
    return count


def cores() -> Iterator[Finding]:
    """Cores, and whether other work has them."""
    count, load = usable_cores(), os.getloadavg()[0]
    busy = load > count
    yield Finding("cores", "note" if busy else "ok", f"{count} to use, load {load:.1f}",
                  "other work runs beside: times and speed ratios that are measured now mean little" if busy else "", {"cores": count, "load": load})


def threads() -> Iterator[Finding]:
    """Settings of threads that make small models slow."""
    count, asked = usable_cores(), {name: int(value) for name in THREADS if (value := os.environ.get(name, "")).isdigit()}
    most = max(asked.values(), default=None)
    said = ", ".join(f"{name}={value}" for name, value in asked.items())
    if most is not None and most > count:
        yield Finding("threads", "note", f"{said} on {count} cores: threads wait for each other", f"export OMP_NUM_THREADS={count}", {"asked": asked})
    else:
        yield Finding("threads", "ok", said or f"not set: torch takes {count}", "", {"asked": asked})


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def memory() -> Iterator[Finding]:
    """Memory against what the default command takes."""
    free = available_memory()
    enough = free >= MEMORY
    yield Finding("memory", "ok" if enough else "missing", f"{free / 1e9:.1f} GB free (the default command takes {MEMORY / 1e9:.1f})",
                  "" if enough else "end other programs or use a machine with more memory; distill prune --dry-run says what a run needs",
                  {"free": free})


def devices() -> Iterator[Finding]:
    """Where tensors could be, and whether bf16 is native."""
    import torch

    from graphs.train import native_bf16

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    bf16 = native_bf16()
    said = f"processor ({platform.processor() or platform.machine()})"
    said += f", {', '.join(names)} (not used: models are trained on the processor)" if names else ""
    yield Finding("devices", "ok" if bf16 else "note", f"{said}; bf16 is {'native' if bf16 else 'not native'}",
                  "" if bf16 else "training is done in float32; a processor with AMX or AVX512-BF16 would be several times faster",
                  {"gpus": names, "native_bf16": bf16})


# ------------------------------------------------------------------------------------------------------ what may be written and run


def _refusal(folder: Path) -> str:
    """Why nothing can be written at `folder`, or "" where it can; leaves nothing behind."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        if not there.is_dir():
            return f"{there} is not a folder"
        with tempfile.NamedTemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there}: {str(error.strerror).lower()}"


def writable(out: Path) -> Iterator[Finding]:
    """Whether runs can be written, and how much space they have."""
    out = out.absolute()
    if why := _refusal(out):
        yield Finding("out", "missing", f"{out} cannot be written ({why})", "give --out a folder that you may write to", {"out": str(out)})
        return
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    enough = free >= DISK
    yield Finding("out", "ok" if enough else "missing", f"{out} can be written, {free / 1e9:.1f} GB left",
                  "" if enough else "free some space or give --out another disk; distill prune --dry-run says what a run takes", {"free": free})


def cache() -> Iterator[Finding]:
    """Whether models of the hub can be kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    why = _refusal(Path(HF_HUB_CACHE).absolute())
    yield Finding("cache", "note" if why else "ok", f"{HF_HUB_CACHE} cannot be written ({why})" if why else f"{HF_HUB_CACHE} can be written",
                  "hub ids cannot be downloaded: set HF_HOME to a folder that you may write to, or give --model a folder" if why else "",
                  {"hub": HF_HUB_CACHE})


def sandbox() -> Iterator[Finding]:
    """Whether model-written programs can be graded, and behind which layers."""
    from evals.sandbox import Sandbox, measured_rate

    try:
        with Sandbox(workers=1) as jails:
            layers, rate = jails.layers(), measured_rate(jails, 20)
    except RuntimeError as error:
        yield Finding("sandbox", "missing", f"no program can be graded: {error}",
                      "Linux is needed, with a /tmp that can be written; python -m evals.sandbox says more")
        return
    off = [name for name, on in layers.items() if not on]
    lost = [name for name in NEEDED if name in off]
    said = f"grades {rate:.0f} programs/s in one jail" + (f"; layers that are not active here: {', '.join(off)}" if off else ", all layers active")
    remedy = ""
    if lost:
        remedy = "do not grade programs of models that you distrust here: use a Linux kernel with seccomp, on x86-64 or arm64"
    elif off:
        remedy = ("the others hold; for all of them allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or "
                  "kernel.apparmor_restrict_unprivileged_userns=0), or start as root in a container that may unshare")
    yield Finding("sandbox", "missing" if lost else "note" if off else "ok", said, remedy, {"layers": layers, "rate": rate})
