"""distill find: a planted trait is found, flipped and told apart from chance; wrong files get one sentence."""

import importlib.util
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.__main__ import main
from graphs.edges import Reconstruction
from graphs.find import Contrast, _case, distances, find, matched
from graphs.host import save
from graphs.prompts import padded, paired
from tests.test_edges import neuron_basis, tiny

ROOT = Path(__file__).parent.parent


def switched():
    """A model in which one neuron of the first MLP, read off token 7, decides between the answers 4 and 5."""
    host = tiny("GPT2LMHeadModel")
    with torch.no_grad():
        block, table = host.module("transformer.h.0.mlp"), host.model.transformer.wte.weight
        direction = table[7] - table[8]
        block.c_fc.weight[:, 5] = direction * 2 / direction.norm()
        block.c_fc.bias[5] = -4.0  # silent but where token 7 stands
        block.c_proj.weight[5] = (table[4] - table[5]) * 1.5
    return host


def prompts(token, count=12):
    generator = torch.Generator().manual_seed(3)
    return padded([[*torch.randint(10, 50, (5 + i % 3,), generator=generator).tolist(), token] for i in range(count)], 2)


@pytest.mark.parametrize("absent", [12, 10], ids=["partners", "means"])
def test_the_planted_switch_is_found_and_random_neurons_are_not(absent):
    host = switched()
    subject = Reconstruction(host, neuron_basis(host))
    report = find(subject, prompts(7), prompts(8, absent), top=1, screened=20, controls=20)
    assert report.chosen == ("L0.F5",) and report.nodes[0].name == "L0.F5"
    assert report.flipped > 0.8 and max(report.random_flipped) < 0.2 and report.p_value <= 0.05
    assert report.prompts == 6 and report.nodes[0].present > report.nodes[0].absent
    assert report.paired == (absent == 12)
    if report.paired:  # held as in the prompt with the trait, the neuron brings it about; others do not
        assert report.induced > 0.8 and max(report.random_induced) < 0.2 and report.broken is None
    else:
        assert report.broken is not None and report.induced is None and report.random_induced == ()


def test_what_the_partners_answer_anyway_is_not_brought_about():
    host = switched()
    subject = Reconstruction(host, neuron_basis(host))
    case = _case(subject, prompts(7), prompts(8))
    assert case.spares(case.spared, case.check, []) == 0.0 and case.spares(case.spared, case.check, [("L0.mlp", 5)]) > 0.8


def test_prompts_of_equal_lengths_alone_are_no_partners():
    assert paired(prompts(7), prompts(8)) and not paired(prompts(7), prompts(8, 10))
    other = padded([[*range(10 + i, 15 + i + i % 3), 8] for i in range(12)], 2)
    assert not paired(prompts(7), other)


def test_partners_are_held_token_by_token():
    host = switched()
    subject, present, absent = Reconstruction(host, neuron_basis(host)), prompts(7), prompts(8)
    case = _case(subject, present, absent)
    there = subject.trace(absent.half(0).ids).sites["L0.mlp"]
    expected = subject.basis["L0.mlp"].activations(there.x)[..., [5, 6]]
    assert torch.allclose(case.choose.levels("L0.mlp", torch.tensor([5, 6])), expected, atol=1e-6)
    here = subject.basis["L0.mlp"].activations(subject.trace(present.half(0).ids).sites["L0.mlp"].x)[..., [5, 6]]
    assert torch.allclose(replace(case.choose, strength=3.0).levels("L0.mlp", torch.tensor([5, 6])), expected + 2 * (expected - here), atol=1e-5)


def test_the_control_is_of_the_same_sites_and_never_of_what_was_found():
    host = switched()
    subject = Reconstruction(host, neuron_basis(host))
    moved = distances(subject, _case(subject, prompts(7), prompts(8)).choose)
    chosen = [("L0.mlp", 5), ("L0.mlp", 6), ("L1.attention", 2)]
    for seed in range(5):
        drawn = matched(subject, moved, chosen, torch.Generator().manual_seed(seed))
        assert [site for site, _ in drawn] == [site for site, _ in chosen] and not set(drawn) & set(chosen) and len(set(drawn)) == 3


def test_log_odds_are_against_the_other_answers_only():
    logits = torch.tensor([[1.0, 2.0, 5.0, 3.0], [4.0, 0.0, 1.0, 2.0]])
    contrast = Contrast(torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert torch.allclose(contrast.log_odds(logits), torch.tensor([1.0, 4.0]))
    alone = Contrast(torch.tensor([1, 1]), torch.tensor([1]))
    assert float(alone.log_odds(logits)[0]) == pytest.approx(2 - float(logits[0, [0, 2, 3]].logsumexp(0)))


def test_too_few_prompts_are_refused():
    host = switched()
    with pytest.raises(ValueError, match="at least four prompts with the trait and four without"):
        find(Reconstruction(host, neuron_basis(host)), prompts(7, 3), prompts(8))


@pytest.fixture
def model(tmp_path):
    host = switched()
    save(host, tmp_path / "model", torch.float32)
    (tmp_path / "present.txt").write_text("".join(f"w{20 + i} w{30 + i} w7\n" for i in range(12)))
    (tmp_path / "absent.jsonl").write_text("".join(json.dumps({"prompt": f"w{20 + i} w{30 + i} w8"}) + "\n" for i in range(12)))
    return tmp_path


def test_the_verb_prints_the_numbers_and_fails_where_chance_does_as_well(model, capsys):
    argv = ["find", "--model", str(model / "model"), "--present", str(model / "present.txt"), "--screened", "10"]
    assert main([*argv, "--absent", str(model / "present.txt")]) == 1
    assert "brought about in partners without it" in capsys.readouterr().out
    main([*argv, "--absent", str(model / "absent.jsonl"), "--json", "--top", "1"])
    made = json.loads(capsys.readouterr().out)
    assert len(made["random_flipped"]) == 20 and len(made["chosen"]) == 1 and 0 < made["p_value"] <= 1


def test_wrong_files_get_one_sentence(model, tmp_path, capsys):
    def refused(*argv):
        assert main(["find", "--model", str(model / "model"), *map(str, argv)]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("distill: ")
        return message

    good = model / "present.txt"
    assert "find needs --present FILE and --absent FILE" in refused("--present", good)
    assert "no such file" in refused("--present", tmp_path / "none", "--absent", good)
    (tmp_path / "empty").write_text("\n")
    assert "it holds no prompt" in refused("--present", tmp_path / "empty", "--absent", good)
    (tmp_path / "bad").write_text('{"text": 1}\n')
    assert "not JSON with a field `prompt`" in refused("--present", good, "--absent", tmp_path / "bad")
    assert "no such folder; give a folder of transcoders" in refused("--present", good, "--absent", good, "--dictionaries", tmp_path / "nothing")
    (tmp_path / "long").write_text("w3 " * 100 + "\n")
    assert "does not fit the model's context of 64" in refused("--present", good, "--absent", tmp_path / "long")


@pytest.mark.slow
def test_the_top_five_nodes_of_a_planted_trait_flip_it_and_matched_random_nodes_do_not(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("trait", ROOT / "benchmarks" / "trait.py")
    trait = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trait)
    host = trait.plant(1)
    assert trait.agrees(host, "Tom") > 0.95 and trait.agrees(host, "Ben") < 0.05
    save(host, tmp_path / "model", torch.float32)
    for who, name in (("Tom", "present"), ("Ben", "absent")):
        (tmp_path / name).write_text(trait.prompts(who))
    files = ["--present", str(tmp_path / "present"), "--absent", str(tmp_path / "absent")]
    assert main(["find", "--model", str(tmp_path / "model"), *files, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(made["chosen"]) == 5 and made["paired"] and made["flipped"] >= 0.9 and made["induced"] >= 0.9
    for random in (made["random_flipped"], made["random_induced"]):  # a few sets hit other carriers of the trait: how many varies by machine
        assert statistics.median(random) <= 0.2 and max(random) < 0.9
    assert made["p_value"] <= 0.05
