"""What is packaged: a wheel holds every source file and asset, and runs in an environment of its own; the citation names the version."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import distill
from tests.reference import ROOMS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_citation_and_the_package_have_the_projects_version_and_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert cited["version"] == project["version"] == distill.__version__ and cited["license"] == project["license"]
    assert cited["abstract"] == project["description"] and {"cff-version", "message", "title", "authors", "type"} <= set(cited)
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {file.parent.relative_to(ROOT).as_posix().replace("/", ".") for room in ROOMS for file in (ROOT / room).rglob("*.py")}


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_runs_there(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "results"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    shipped = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}
    assert shipped <= held, sorted(shipped - held)[:5]

    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", wheel], check=True)
    # what it depends on is lent, since nothing can be fetched here; .pth files, such as that of an editable install, do not count on this path
    lent = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=lent, capture_output=True, text=True, check=True).stdout

    where = run(str(python), "-c", "import distill, graphs.fit; print(distill.__file__); print(graphs.fit.__file__)").split()
    assert all(Path(file).is_relative_to(place) for file in where)
    distill_ = str(place / "bin" / "distill")
    assert "distill VERB" in run(distill_, "--help") and run(distill_, "--version").strip() == distill.__version__
    planned = run(distill_, "prune", "--dry-run", "--out", str(tmp_path / "run"))  # reads the builtin organism and the clean rows
    assert "ArceeForCausalLM" in planned and "2,304 clean rows" in planned
