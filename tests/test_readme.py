"""The README and the page of results are true: their tables are generated from the committed rows, and their commands and names exist."""

import importlib
import re
from pathlib import Path

from distill import config
from distill.__main__ import VERBS
from distill.models import ASSETS, BUILTIN
from graphs.architectures import ARCHITECTURES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()


def test_the_table_is_generated_from_the_committed_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pages = importlib.import_module("pages")
    assert pages.rows() and [pages.page(file) for file in pages.PAGES] == [README, RESULTS]
    assert all((README + RESULTS).count(f"<!-- {name}: begin -->") == 1 for name in pages.BLOCKS)


def test_links_lead_to_a_section_that_is_there():
    anchors = {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^## (.+)$", RESULTS, re.MULTILINE)}
    assert set(re.findall(r"docs/results\.md#([a-z0-9-]+)", README)) <= anchors
    for page, folder in ((README, ROOT), (RESULTS, ROOT / "docs")):
        assert all((folder / link).exists() for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page))


def test_every_verb_flag_and_builtin_model_it_names_exists():
    fields = {name.strip("_").replace("_", "-") for verb, _ in VERBS.values() for name in verb.__dataclass_fields__}
    fields |= {"config", "index-url", "constraint"}
    assert set(re.findall(r"--([a-z][a-z-]+)", README + RESULTS)) <= fields
    assert {verb for verb in re.findall(r"`distill ([a-z]+)", README)} <= set(VERBS)
    assert {name for name in re.findall(r"builtin:([a-z-]+)", README)} <= set(BUILTIN)
    assert config.Prune().out == Path("runs/default")


def test_it_counts_the_classes_that_graphs_can_be_built_of():
    assert set(re.findall(r"(\d+) classes", README)) == {str(len(ARCHITECTURES))}
    assert "Twelve of the" in README and sum(row.post is None for row in ARCHITECTURES.values()) == 12


def test_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`make ([a-z]+)`", README))


def test_what_ships_is_small_and_whole():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 30e6
    assert all((ASSETS / name / "model" / "model.safetensors").is_file() for name in BUILTIN) and (ASSETS / "clean_rows.parquet").is_file()
    assert not (ASSETS / "base" / "secret").exists()
