"""The verb: fit writes a monitor that knows its own graph, score and serve answer in JSON lines, and wrong input is refused."""

import io
import json

import pytest

from distill import config
from distill.monitor import run
from distill.prompts import texts
from evals.tasks import TASKS
from graphs.host import load, save


@pytest.fixture(scope="module")
def fitted(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor") / "watch"
    assert run(config.Monitor(action="fit", model=str(tiny_model_folder), monitor=folder, rows=24, calibration=19, false_positives=0.05)) == 0
    return folder


def test_score_and_serve_answer_in_lines_alike(fitted, tmp_path, capsys, monkeypatch):
    prompts = [row.prompt for row in TASKS["coding"].rows("test", 2)]
    file = tmp_path / "prompts.txt"
    file.write_text(prompts[0].replace("\n", "\\n") + "\n" + json.dumps({"prompt": prompts[1]}) + "\n")
    assert run(config.Monitor(monitor=fitted, prompts=file)) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        assert line["score"] == max(token["score"] for token in line["tokens"]) and len(line["tokens"]) == 2
        assert line["flagged"] == (line["score"] > line["threshold"]) and (line["reason"] is not None) == line["flagged"]
        assert all(0 <= token[part] <= 1 for token in line["tokens"] for part in ("unfamiliar", "range", "pairs"))
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    assert run(config.Monitor(action="serve", monitor=fitted)) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["score"] for one in again] == pytest.approx([one["score"] for one in lines], abs=1e-2)


def test_a_receipt_stands_beside_the_monitor_and_facts_name_the_guarantee(fitted):
    facts = json.loads((fitted / "monitor.json").read_text())
    assert facts["calibrated"] == 19 and facts["rate"] == 0.05 and (fitted / "receipt.json").is_file()


def test_a_monitor_of_a_run_is_found_beside_it(tiny_run, capsys, monkeypatch):
    assert run(config.Monitor(action="fit", run=tiny_run, rows=24, calibration=19, false_positives=0.05)) == 0
    assert "with probability at most 0.05 (19 calibration prompts)" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("def solve(prices):\\n\n"))
    assert run(config.Monitor(run=tiny_run)) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "def solve(prices):\n"


def test_wrong_input_is_refused_in_a_sentence(fitted, tmp_path, tiny_model_folder):
    with pytest.raises(ValueError, match="there is no monitor; run distill monitor fit first"):
        run(config.Monitor(monitor=tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        run(config.Monitor(monitor=fitted, prompts=tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="is not JSON"):
        list(texts(['{"prompt"'], "--prompts"))
    with pytest.raises(ValueError, match="needs --monitor FOLDER"):
        run(config.Monitor(action="fit", model=str(tiny_model_folder), rows=16, calibration=19, false_positives=0.05))
    with pytest.raises(ValueError, match="needs at least 99"):
        run(config.Monitor(action="fit", model=str(tiny_model_folder), monitor=tmp_path / "m", rows=16, calibration=20))


def test_a_changed_model_is_refused(tiny_model_folder, tmp_path):
    host = load(tiny_model_folder)
    save(host, tmp_path / "model")
    run(config.Monitor(action="fit", model=str(tmp_path / "model"), monitor=tmp_path / "watch", rows=16, calibration=19, false_positives=0.05))
    host.model.get_input_embeddings().weight.data[0] += 1
    save(host, tmp_path / "model")
    with pytest.raises(ValueError, match="has changed since"):
        run(config.Monitor(monitor=tmp_path / "watch"))
