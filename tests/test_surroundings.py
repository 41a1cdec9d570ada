"""Surroundings: the same row at the end of a longer context, which alone is judged."""

import json
import shutil

import pytest

from distill.__main__ import main
from distill.surroundings import LENGTHS, behind, surroundings
from evals.tasks import TASKS
from graphs.batches import Encoded, collate
from graphs.hypotheses.understanding import GROUPS


def test_a_row_stands_behind_as_many_whole_rows_as_fit():
    row, before = Encoded((1, 2, 3), 2), [Encoded((4, 5), 1), Encoded((6, 7, 8), 1), Encoded((9,), 1)]
    assert behind(row, before, 8) == Encoded((4, 5, 6, 7, 8, 1, 2, 3), 7)
    assert behind(row, before, 7) == Encoded((4, 5, 1, 2, 3), 4)  # none is skipped for a shorter one
    assert behind(row, before, 4) is None and behind(row, [], 100) is None


def test_contexts_are_long_end_in_the_row_and_hold_the_right_rows(tiny_host):
    found = surroundings(tiny_host, [TASKS["coding"]], 4)
    assert set(found) == {f"{kind} {length}" for kind in ("few-shot", "distractor") for length in LENGTHS}
    rows = TASKS["coding"].rows("test", 4, seed=3)
    say = tiny_host.tokenizer.decode
    for name, texts in found.items():
        kind, length = name.split()
        assert len(texts) == 4 and all(int(length) / 2 < len(one.ids) <= int(length) for one in texts)
        for row, one in zip(rows, texts, strict=True):
            batch = collate([one], 0)
            assert say(batch.ids[batch.completion], skip_special_tokens=True) == row.completion
            before = say(one.ids[: one.prompt], skip_special_tokens=True)
            assert before.endswith(row.prompt) and ("def " in before[: -len(row.prompt)]) == (kind == "few-shot")


def test_a_model_with_a_short_context_has_only_what_it_can_hold(tiny_host):
    tiny_host.model.config.max_position_embeddings = 300
    assert set(surroundings(tiny_host, [TASKS["coding"]], 2)) == {"few-shot 256", "distractor 256"}


@pytest.mark.slow
def test_the_verb_measures_longer_contexts(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("graphs.hypotheses.proposals.LOOKS", (("", ""),))
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    small = ["understand", str(folder), "--rows", "24", "--judged", "32", "--tested", "2", "--prompts", "2", "--contexts"]
    assert main([*small, "--json"]) == 0
    contexts = json.loads(capsys.readouterr().out)["contexts"]
    assert set(contexts) == {f"{kind} {length}" for kind in ("few-shot", "distractor") for length in LENGTHS}
    for one in contexts.values():
        assert set(one["shares"]) == set(GROUPS) and one["tokens"] > 0
        assert sum(share["value"] for share in one["shares"].values()) == pytest.approx(one["whole"]["value"])
    assert main(small) == 0 and "few-shot 512" in capsys.readouterr().out
