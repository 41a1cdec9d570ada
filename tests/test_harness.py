"""The adapter to the lm-evaluation-harness: refused in one sentence where it is missing; else it sees what our own judge sees."""

import json
import sys
from pathlib import Path

import pytest

from distill.__main__ import main
from evals.generate import continuation_logprob
from evals.harness import run, wrapped
from evals.tasks import TASKS
from graphs.host import load
from graphs.replace import Replacement

ROWS = TASKS["stories"].rows("test", 12)
YAML = """task: tiny_stories
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def test_without_lm_eval_the_flag_is_refused_with_what_to_install(tiny_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert main(["evaluate", "--run", str(tiny_run), "--lm-eval", "arc_easy"]) == 2
    assert "pip install 'distill-circuits[lm-eval]'" in capsys.readouterr().err


def test_a_part_of_a_run_is_for_the_harness_only(tiny_run, capsys):
    assert main(["evaluate", "--run", str(tiny_run), "--part", "circuit"]) == 2
    assert "--part circuit goes with --lm-eval and --run" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["checkpoint", "circuit", "graph"])
def test_the_harness_finds_the_likelihoods_that_we_find(tiny_run, tiny_model_folder, part):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    host = load(tiny_run / "checkpoint") if part == "checkpoint" else Replacement.load(tiny_run / part, load(tiny_model_folder)).host()
    asked = [Instance("loglikelihood", {}, (row.prompt, row.completion), 0) for row in ROWS]
    found = [total for total, _ in wrapped(host).loglikelihood(asked, disable_tqdm=True)]
    ours = continuation_logprob(host, [row.prompt for row in ROWS], [row.completion for row in ROWS]).tolist()
    assert found == pytest.approx(ours, abs=1e-3)


def test_a_task_of_ones_own_is_judged_from_the_command_line(tiny_run, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": row.prompt, "choices": [row.completion, row.foil], "right": 0}) + "\n" for row in ROWS))
    (tmp_path / "tiny.yaml").write_text(YAML.replace("FILE", str(file)))
    flags = ["--part", "circuit", "--lm-eval", "tiny_stories", "--lm-eval-folder", str(tmp_path), "--json"]
    assert main(["evaluate", "--run", str(tiny_run), *flags]) == 0
    said = capsys.readouterr().out
    host = Replacement.load(tiny_run / "circuit", load(Path(json.loads((tiny_run / "receipt.json").read_text())["config"]["model"]))).host()
    likely = [continuation_logprob(host, [row.prompt for row in ROWS], texts) for texts in ([r.completion for r in ROWS], [r.foil for r in ROWS])]
    assert json.loads(said[said.index("{"):])["tiny_stories"]["acc"] == pytest.approx(float((likely[0] > likely[1]).double().mean()))
    with pytest.raises(ValueError, match="lm-eval knows no task"):
        run(host, ["no_such_task_at_all"])
