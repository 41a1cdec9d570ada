"""A circuit as a program: it runs by itself, its logits are the circuit's and the substituted run's, and each number in it counts."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from distill.__main__ import main
from distill.listing import alone
from distill.runs import reopen
from graphs.architectures import ARCHITECTURES
from graphs.artifact import read_json, write_json
from graphs.batches import Batch
from graphs.dictionary import Dictionary, Part, TopK
from graphs.edges import Reconstruction
from graphs.equations import listing
from graphs.flow import build
from graphs.graph import index
from graphs.hypotheses import arithmetic, views
from graphs.hypotheses.hypothesis import FAR, Head, Hypothesis, Look, Sum, Table, Tables
from graphs.hypotheses.program import program
from graphs.hypotheses.source import copied
from graphs.hypotheses.substitution import in_place, run
from graphs.hypotheses.verdict import Evidence, Judged, Share
from graphs.hypotheses.views import RELATIONS, VIEWS, Text
from graphs.replace import from_noise
from tests.test_edges import neuron_basis, random_basis, tiny

CLASSES = [name for name, row in ARCHITECTURES.items() if row.post is None]


def accepted(target, rule):
    return Judged(Hypothesis(target, rule), Evidence(0.5, 1e-3, Share(0.9, 0.8, 1.0), Share(0.0, -0.1, 0.1)))


def clean(seed=1):
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(seed))
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, real, real)


def imported(file):
    """The program as a module of this process."""
    spec = importlib.util.spec_from_file_location(f"program_{abs(hash(str(file)))}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(subject, tmp_path, tested=(), most=3):
    made = program(subject, build(subject, [clean()], 0.95, 1 << 28), tested, list(clean().ids[:2]), most, "a test")
    return imported(made.save(tmp_path))


def invented(nodes):
    """One hypothesis of each kind, right or not, and one that is about the same node as another."""
    words = {f"w{at}": (0.1 * at - 2,) for at in range(3, 40)}
    pairs = {f"w{at}|w{at + 1}": (float(at),) for at in range(3, 49)}
    look = Look({"previous": 2.5, "same token": -1.0, "first": 0.0}, tuple(0.05 * at for at in range(FAR + 1)), "token", "position",
                {"w5\t2": 3.0, "w9\t0": -4.0})
    wide = nodes.by_name["L1.attention"].width
    values = Tables((Table("token", {f"w{at}": tuple(0.01 * (at + c) for c in range(wide)) for at in range(3, 30)}),), (0.25,) * wide)
    return [accepted("L0.F3", Tables((Table("pair", pairs), Table("token", words)), (0.5,))), accepted("L0.H1", look),
            accepted("L1.H0", Head(Look({"itself": 1.0, "after same token": 2.0}), values)), accepted("L1.H2.C1", Tables((), (0.75,))),
            accepted("L1.F2", Sum({"L0.F3": 0.7, "L1.H0.C1": -0.4, "token 'w7'": 1.5}, 0.125)), accepted("L1.F4", Tables((), (9.0,))),
            accepted("L1.F4", Tables((Table("seen before", {"1|w5": (1.0,)}),), (-1.0,))), accepted("L1.H3", Tables((), (0.1,) * wide))]


@torch.no_grad()
def exact(name, basis, tmp_path):
    circuit, ids = from_noise(tiny(name), 12, 0, attention="kept", skip=2 * (basis == "features"), basis=basis), clean(7).ids[0]
    for part in circuit.transcoders().values():
        if part.skip_out is not None:
            part.skip_out.normal_(0, 0.2)
    found = written(Reconstruction(circuit.host(), circuit.basis()), tmp_path).circuit(ids.numpy())
    assert found == pytest.approx(circuit(ids[None])[0].numpy(), abs=1e-5) and np.abs(found).max() > 0.1


def test_gated_neurons_are_written_exactly(tmp_path):
    exact("LlamaForCausalLM", "neurons", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_written_exactly_with_transcoders_and_with_its_own_neurons(name, tmp_path):
    for basis in ("features", "neurons"):
        exact(name, basis, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GPT2LMHeadModel"])
def test_with_hypotheses_it_is_the_substituted_run(name, tmp_path):
    circuit = from_noise(tiny(name), 12, 0, attention="kept")
    subject, ids = Reconstruction(circuit.host(), circuit.basis()), clean(7).ids[:1]
    nodes = index(subject.host, subject.basis)
    tested = [*invented(nodes), Judged(Hypothesis("L0.F5", Tables((), (99.0,))), Evidence(0.0, 1e-3, Share(0.0, 0.0, 0.0), None, "rejected"))]
    held = [one.hypothesis for one in tested if one.evidence.accepted]
    made = written(subject, tmp_path, tested)
    text = Text.of(Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)), nodes.tokens)
    wanted = run(subject, ids, in_place(nodes, subject, text, held))[0].numpy()
    assert made.circuit(ids[0].numpy()) == pytest.approx(wanted, abs=1e-5)
    assert made.circuit(ids[0].numpy(), code=False) == pytest.approx(circuit(ids)[0].numpy(), abs=1e-5)
    assert np.abs(wanted - circuit(ids)[0].numpy()).max() > 0.1
    for at in range(len(held)):  # each of them is there
        less = in_place(nodes, subject, text, held[:at] + held[at + 1 :])
        assert (np.abs(run(subject, ids, less)[0].numpy() - wanted).max() > 1e-3) == (at != 5)  # L1.F4 has a later one


def test_what_cannot_run_by_itself_is_refused(tmp_path):
    host = tiny("LlamaForCausalLM")
    graph = build(Reconstruction(host, neuron_basis(host)), [clean()], 0.95, 1 << 28)

    def refused(subject):
        with pytest.raises(ValueError) as error:
            program(subject, graph, [], [], 3, "a test")
        return str(error.value)

    assert "only a circuit" in refused(Reconstruction(host, neuron_basis(host), {"L0.attention": host.module(host.sites[0].module)}))
    gemma = tiny("Gemma2ForCausalLM")
    assert "a norm scales" in refused(Reconstruction(gemma, neuron_basis(gemma)))
    topk = neuron_basis(host) | {"L0.mlp": Dictionary((Part(torch.zeros(48, 32), torch.zeros(48), torch.zeros(48, 32), TopK(3)),), torch.zeros(32))}
    assert "TopK is not written" in refused(Reconstruction(host, topk))
    host.model.model.rotary_emb.rope_type = "dynamic"
    assert "how long the text is" in refused(Reconstruction(host, neuron_basis(host)))
    neurons = tiny("GPT2LMHeadModel", activation_function="mish")
    graph = build(Reconstruction(neurons, neuron_basis(neurons)), [clean()], 0.95, 1 << 28)
    assert "activation mish" in refused(Reconstruction(neurons, neuron_basis(neurons)))
    assert random_basis  # errors: a basis with some has stand-ins, refused above


def test_copied_definitions_are_the_ones_that_are_tested_and_no_more():
    imports, library = copied([views, arithmetic], "line_break(texts), state(texts)")
    assert imports.splitlines() == ["import numpy as np", "import re", "from dataclasses import dataclass"]
    for text in ("def line_break(texts):", "class Automaton:", "    assigned: bool = False", "    @property", "\nKEPT = re.compile(",
                 "def _after(texts, said):"):
        assert text in library
    assert "docstring(texts" not in library and "@view" not in library and "Tensor" not in library and "np.ndarray" not in library


def test_every_view_and_relation_says_the_same_without_this_package():
    names = [function.__name__ for function in (*VIEWS.values(), *RELATIONS.values())]
    space: dict = {}
    exec("\n".join(copied([views, arithmetic], ", ".join(names))), space)  # our own source
    texts = ["def", " f", "(", "n", "):", "\n   ", ' """', "Add", " 5", ',', " twice", '."""', "\n   ", " b", " =", " len", "(", "n", ")", "\n", " n"]
    for function in VIEWS.values():
        assert space[function.__name__](texts) == function(texts)
    for function in RELATIONS.values():
        assert np.array_equal(space[function.__name__](texts), function(texts))


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """A copy of the tiny run, without hypotheses."""
    copy = shutil.copytree(tiny_run, tmp_path_factory.mktemp("listed") / "run")
    shutil.rmtree(copy / "hypotheses", ignore_errors=True)
    return copy


def listed(capsys, folder, *argv):
    status = main(["listing", str(folder), "--rows", "16", *argv])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_the_listing_defines_each_value_before_its_uses(folder, capsys):
    status, out, _ = listed(capsys, folder)
    defined = set()
    lines = [line for line in out.splitlines() if line and not line.startswith("#")]
    for line in lines:
        name, _, body = line.partition(" = ")
        used = set(re.findall(r"\*(L\d+\.(?:F\d+|H\d+\.C\d+))", body))
        assert used <= defined, (line, used - defined)
        defined.add(name)
    graph = reopen(folder, "circuit").edges(16, 0.95, 512 << 20)
    assert status == 0 and len(lines) == len(listing(graph)) and any(line.startswith("logit ") for line in lines)


def tampered(folder, tmp_path, change):
    """A copy of the listing, changed, and run by itself."""
    copy = shutil.copytree(folder / "listing", tmp_path / "changed", dirs_exist_ok=True)
    change(copy)
    return alone(copy / "circuit.py")


def one_weight(name, at):
    def change(copy):
        with np.load(copy / "circuit.npz") as held:
            arrays = dict(held)
        arrays[name][at] += 0.05
        np.savez(copy / "circuit.npz", **arrays)
    return change


def one_number(pattern):
    """Add 3 to the first number that the pattern's group finds."""
    def change(copy):
        source = (copy / "circuit.py").read_text()
        found = re.search(pattern, source)
        (copy / "circuit.py").write_text(source[: found.start(1)] + f"{float(found[1]) + 3:g}" + source[found.end(1) :])
    return change


def test_the_file_runs_by_itself_and_a_changed_weight_or_number_is_seen(folder, capsys, tmp_path):
    status, out, _ = listed(capsys, folder, "--code")
    assert status == 0 and "pass: logits are the circuit's" in out and "hypotheses" not in out
    file = folder / "listing" / "circuit.py"
    assert alone(file).returncode == 0
    tree = ast.parse(file.read_text())
    roots = {alias.name.split(".")[0] for one in ast.walk(tree) if isinstance(one, ast.Import) for alias in one.names}
    roots |= {one.module.split(".")[0] for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)}
    assert roots <= {"numpy", *sys.stdlib_module_names}
    alive = next(name for name in re.findall(r"(L0_F\d+) = relu\(k\*", file.read_text()))
    assert tampered(folder, tmp_path, one_weight("L1.attention.query", (0, 0, 0))).returncode == 1
    assert tampered(folder, tmp_path, one_weight("embedding", (reopen(folder, "circuit").ids("def", "x")[-1], 0))).returncode == 1
    failed = tampered(folder, tmp_path, one_number(alive + r" = relu\(k\*\((-?[\d.]+)\*"))
    assert failed.returncode == 1 and "FAIL" in failed.stdout


def test_its_logits_are_the_circuits_on_prompts_it_was_not_checked_on(folder, capsys):
    listed(capsys, folder, "--code")
    opened = reopen(folder, "circuit")
    ids = opened.ids('def solve(names):\n    """Given the names, sort them."""\n    return', "x")
    code = ("import importlib.util, json, sys\nspec = importlib.util.spec_from_file_location('circuit', sys.argv[1])\n"
            "made = importlib.util.module_from_spec(spec); spec.loader.exec_module(made)\n"
            "print(json.dumps([made.circuit(json.loads(sys.argv[2])).tolist(), [m for m in ('torch', 'distill', 'graphs') if m in sys.modules]]))")
    done = subprocess.run([sys.executable, "-I", "-c", code, str(folder / "listing" / "circuit.py"), json.dumps(ids)], capture_output=True, text=True)
    logits, loaded = json.loads(done.stdout)
    with torch.no_grad():
        wanted = opened.replacement(torch.tensor([ids]))[0]
    assert loaded == [] and torch.allclose(torch.tensor(logits), wanted, atol=1e-4)


def test_accepted_hypotheses_stand_in_the_file_and_their_tables_count(folder, capsys, tmp_path):
    opened = reopen(folder, "circuit")
    nodes = opened.edges(16, 0.95, 512 << 20).index
    words = {text: (0.2,) for text in nodes.tokens if text.strip()}
    look = Look({"previous": 3.0}, tuple(0.1 for _ in range(FAR + 1)))
    made = [accepted("L0.F1", Tables((Table("token", words),), (0.5,))), accepted("L1.H0", look), accepted("L1.F0", Sum({"L0.F1": 2.0}, 0.5))]
    write_json(folder / "hypotheses" / "circuit" / "hypotheses.json", [one.data() for one in made])
    write_json(folder / "hypotheses" / "circuit" / "receipt.json", {"of": opened.key})
    status, out, _ = listed(capsys, folder, "--code", "--json", "--samples", "2")
    found = json.loads(out)
    assert status == 0 and found["passed"] and len(found["samples"]) == 2 and found["kl"] > 0
    assert all(one["circuit"] < 1e-4 and one["hypotheses"] < 1e-4 for one in found["samples"])
    assert read_json(folder / "listing" / "receipt.json")["hypotheses"] == 3
    source = (folder / "listing" / "circuit.py").read_text()
    for said in ("def table_L0_F1(texts):", "def look_L1_H0(texts):", "def equation_L1_F0(ids, L0_F1):",
                 "# L1.H0: looks at previous +3.0, distance. Recovers"):
        assert said in source
    assert tampered(folder, tmp_path, one_number(r"' the': ([\d.]+),")).returncode == 1
    assert tampered(folder, tmp_path, one_number(r"otherwise=([\d.]+)")).returncode == 1
    shutil.copy(tmp_path / "changed" / "circuit.py", folder / "listing" / "circuit.py")
    status, out, _ = listed(capsys, folder, "--code", "--samples", "2")
    assert status == 1 and "FAIL" in out  # a file that was changed by hand is found again, and not believed
    write_json(folder / "hypotheses" / "circuit" / "receipt.json", {"of": "another circuit"})
    status, _, err = listed(capsys, folder, "--code")
    assert status == 2 and "an earlier circuit" in err
    shutil.rmtree(folder / "hypotheses")


def test_a_fitted_graph_is_not_written_and_nothing_is_left(folder, capsys):
    shutil.rmtree(folder / "listing", ignore_errors=True)
    status, _, err = listed(capsys, folder, "--code", "--part", "graph")
    assert status == 2 and "only a circuit runs by itself" in err and not (folder / "listing").exists()
