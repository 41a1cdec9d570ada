"""Imports go down only: distill -> evals, backdoor -> graphs; nobody imports a room that is not on its list."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN = {f"graphs.{name}" for name in ("architectures", "host", "train", "artifact", "batches", "boundary", "losses", "activations", "targets",
                                      "processes", "shares")}
"""Files of the ground floor that know no feature graph."""
ALLOWED = {
    "graphs": lambda name: name.startswith("graphs"),
    "backdoor": lambda name: name.startswith("backdoor") or name in PLAIN | {"graphs.transcoder"},  # attackers fit their own; they know no graph
    "evals": lambda name: name.startswith("evals") or name in PLAIN | {"backdoor.triggers", "backdoor.behaviours"},
    "distill": lambda name: True,
}
ROOMS = tuple(ALLOWED)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            deeper = {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= deeper or {node.module}
    return {name for name in found if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_only(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [(file.name, name) for file in files for name in imports(file) if not ALLOWED[room](name)]
    assert not wrong


def test_only_the_table_of_architectures_knows_hugging_face_module_names():
    names = ("self_attn", "input_layernorm", "post_attention_layernorm")
    knowing = {f.relative_to(ROOT).as_posix() for room in ROOMS for f in (ROOT / room).rglob("*.py") if any(n in f.read_text() for n in names)}
    assert knowing <= {"graphs/architectures.py"}


def test_no_vague_file_names_and_no_long_files():
    files = [file for room in (*ROOMS, "tests") for file in (ROOT / room).rglob("*.py")]
    assert not [file for file in files if file.stem in ("utils", "common", "types", "helpers")]
    assert not [file.name for file in files if len(file.read_text().splitlines()) > 400]


def test_no_pickles_are_loaded():
    banned = ("torch.load(", "pickle.load", "joblib.load")
    assert not [(f.name, b) for room in ROOMS for f in (ROOT / room).rglob("*.py") for b in banned if b in f.read_text()]
