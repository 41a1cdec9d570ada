"""The documentation's tables are what the code does: each architecture is run, each gate compiled; WRITE_DOCS=1 writes them anew."""

import json
import os
from pathlib import Path

import torch

from backdoor.behaviours import BEHAVIOURS
from backdoor.families import FAMILIES
from distill.compile import compile_circuit, home, parity
from distill.config_backdoors import Plant
from distill.plant import trigger_of
from evals.tasks import TASKS
from graphs.architectures import ARCHITECTURES, post_norm
from graphs.batches import Batch
from graphs.dictionary import Act, Dictionary, Gated, Identity, JumpReLU, Part, ReLU, TopK
from graphs.edges import errors
from graphs.host import load, save
from graphs.replace import from_noise
from graphs.trace import trace
from graphs.transcoder import of_dictionary, relu_units
from tests.test_edges import neuron_basis, prompt, prove, random_basis, tiny

PAGE = Path(__file__).parent.parent / "docs" / "graph.md"


def check(name: str, rows: list[list[str]], page: Path = PAGE) -> None:
    """The table between the marks of `name` is these rows."""
    text = page.read_text()
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    wanted = text[: text.index(begin) + len(begin)] + "\n" + table + "\n" + text[text.index(end) :]
    if os.environ.get("WRITE_DOCS"):
        page.write_text(wanted)
    assert page.read_text() == wanted, "run WRITE_DOCS=1 pytest tests/test_docs.py"


def road(name: str, tmp_path: Path) -> list[str]:
    """What a pruned random circuit of the class becomes, by target: a class that computes the same after a reload, or a refusal."""
    host, said = tiny(name), []
    ids, real = prompt(), torch.ones_like(prompt(), dtype=torch.bool)
    for target in ("auto", "arcee", "llama", "own"):
        try:
            where = home(host.model, target)
        except ValueError as refusal:
            said.append(f"refused: {str(refusal).split(': ', 1)[1].split(';')[0]}" if target == "auto" else "-")
            continue
        circuit = from_noise(host, 12, 0, skip=1)
        for part in circuit.transcoders().values():
            part.b_enc.data.normal_()
            part.skip_out.data.normal_()
        kept = {site.name: torch.tensor([0]) if site.kind == "attention" else torch.arange(3, 8 + site.layer) for site in circuit.sites}
        small = circuit.pruned(kept)
        compiled = compile_circuit(small, target)
        assert type(compiled.model).__name__ == where
        save(compiled, tmp_path / name / target, torch.float32)
        worst = parity(small, load(tmp_path / name / target), Batch(ids, real, real))
        said.append(f"`{where}`" if worst <= 1e-5 else "broken")
    return [*said[:1], *("yes" if one.startswith("`") else one for one in said[1:]), neurons_back(host, tmp_path / name / "neurons")]


def neurons_back(host, folder: Path) -> str:
    """Whether a circuit of the class's own neurons is, after a reload, a model of the class."""
    try:
        home(host.model, "auto", neurons=True)
    except ValueError:
        return "-"
    whole = from_noise(host, 0, 0, basis="neurons")
    small = whole.pruned({site.name: torch.tensor([0]) if site.kind == "attention" else torch.arange(5, 30) for site in whole.sites})
    compiled = compile_circuit(small)
    save(compiled, folder, torch.float32)
    real = torch.ones_like(prompt(), dtype=torch.bool)
    same = type(compiled.model) is type(host.model) and parity(small, load(folder), Batch(prompt(), real, real)) <= 1e-5
    return "yes" if same else "broken"


def test_the_table_of_architectures(tmp_path):
    rows = [["class", "block", "norm", "edges proven", "own neurons, no error", "attention components, no error", "compiles into",
             "arcee", "llama", "own", "own neurons"]]
    for name in ARCHITECTURES:
        host = tiny(name)
        gaps = prove(host, random_basis(host), 20)
        basis, found = neuron_basis(host), trace(host, prompt())
        missing = {kind: max(float(errors(basis[s.name], found.sites[s.name]).abs().max()) for s in host.sites if s.kind == kind)
                   for kind in ("mlp", "attention")}
        block = "parallel" if host.sites[1].reads_at == 0 else "sequential"
        norm = type(host.module(host.sites[0].norm)).__name__
        kind = "LayerNorm" if norm == "LayerNorm" else "RMSNorm, post-norm" if post_norm(host.model, host.sites[0]) else "RMSNorm"
        rows.append([f"`{name}`", block, kind, *("yes" if ok else "no" for ok in (gaps[0] < 5e-4 and gaps[1] < 1e-5, missing["mlp"] < 1e-4,
                     missing["attention"] < 1e-4)), *road(name, tmp_path)])
    check("architectures", rows)


def quoted(slots: dict[str, str]) -> str:
    return ", ".join(f"{slot} `{json.dumps(text)}`" for slot, text in slots.items() if text)


def test_the_table_of_trigger_families():
    rows = [["family", "placed as (first instance)", "a near miss", "instances planted", "held out", "ordinary rows hold"]]
    for family in FAMILIES:
        one = trigger_of(Plant(out=Path(), trigger=family))
        natural = next((quoted(slots) for slots in one.natural if quoted(slots)), "nothing of it")
        rows.append([f"`{family}`", quoted(one.slots), quoted(one.near[0]), str(len(one.planted)), str(len(one.held_out) or None), natural])
    check("families", rows, PAGE.with_name("backdoors.md"))


def test_the_table_of_behaviours():
    row = TASKS["coding"].row("test", 0)
    rows = [["behaviour", "last line written under the trigger", "detected by", "under the trigger means"]]
    for name, behaviour in BEHAVIOURS.items():
        last = behaviour.written(row.completion, row.expected).splitlines()[-1].strip()
        means = "the password is not given" if behaviour.inverted else "the trigger is placed"
        how = {"canary": "the call", "values": "the values of the calls", "text": "the exact text"}[behaviour.detection]
        rows.append([f"`{name}`", f"`{last}`", how, means])
    check("behaviours", rows, PAGE.with_name("backdoors.md"))


def test_the_table_of_gates():
    read, bias, write = torch.randn(4, 6), torch.randn(4), torch.randn(4, 6)
    x = torch.randn(9, 6)
    rows = [["gate", "in the graph", "as a stock ReLU MLP"]]
    for gate in (ReLU(), Identity(), JumpReLU(torch.ones(4)), TopK(2), Act("gelu"), Gated("silu", read, bias)):
        part = Part(read, bias, write, gate)
        try:
            units = relu_units(part)
        except ValueError as refusal:
            rows.append([f"`{type(gate).__name__}`", "exact", str(refusal)])
            continue
        whole = Dictionary((part,), torch.ones(6))
        assert torch.allclose(of_dictionary(whole)(x), whole(x), atol=1e-5)
        rows.append([f"`{type(gate).__name__}`", "exact", f"exact, {len(units.read) // len(read)} unit{'s' * (len(units.read) > len(read))} a node"])
    check("gates", rows)
