"""Rivals beside our row: the other ways to clean the same model, at equal clean rows and equal training tokens.

    clean fine-tuning    learning rate swept       no new weights, nothing smaller
    UNDO                 noise share swept         shrink towards noise, distil on outputs
    dense refit          the checkpoint's shapes   our losses from noise, without sparsity, gates or a wider dictionary

Equal tokens: each rival trains on as many batches of the same size, from the same rows, as all our stages together. Each
is judged by the same code on the same prompts. A row carries the hash of the model, the rows and the config it came from.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from backdoor.removal import dense_refit, fine_tuning, undo
from distill import config
from distill.models import Secret
from distill.rows import batches
from evals.evaluate import Backdoor, EvaluateConfig, judge_models, retention
from evals.tasks import TASKS, named
from graphs.artifact import digest
from graphs.host import Host, load, save, sites


def random_student(checkpoint: Path, host: Host, seed: int) -> Host:
    """A stock model of the checkpoint's shapes with fresh block weights and the host's embeddings and norms."""
    student = load(checkpoint)
    torch.manual_seed(seed)
    fresh = type(student.model)._from_config(student.model.config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        source = dict(host.model.named_parameters())
        for name, parameter in fresh.named_parameters():
            if name in source and source[name].shape == parameter.shape and ("norm" in name or "embed" in name):
                parameter.copy_(source[name])
            elif parameter.ndim > 1:
                scale = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 * scale)
            else:
                parameter.zero_()
    return Host(fresh, host.tokenizer, sites(fresh))


def contenders(host: Host, data, verb: config.Prune, steps: int, checkpoint: Path) -> Iterator[tuple[str, float, Callable[[], Host]]]:
    """(name, knob, how to make it) of every rival."""

    def refit(knob: float) -> Host:
        return dense_refit.remove(host, random_student(checkpoint, host, verb.seed), data, verb.fit_steps, steps, knob)

    for knob in fine_tuning.KNOBS:
        yield f"clean fine-tuning, lr {knob:g}", knob, partial(fine_tuning.remove, host, data, steps, knob)
    for knob in undo.KNOBS:
        yield f"UNDO, noise {knob:g}", knob, partial(undo.remove, host, data, steps, knob)
    for knob in dense_refit.KNOBS:
        yield "dense refit", knob, partial(refit, knob)


def run_rivals(
    verb: config.Prune, model: Path, secret: Secret | None, texts: list[tuple[str, str]], steps: int, prompts: int, out: Path
) -> list[dict]:
    """Make and judge every rival that `out` does not hold yet; each finished row is appended at once, so a killed run resumes."""
    host = load(model)
    data, rows = batches(host, texts, verb.batch, verb.seed)
    tokens = sum(int(data(step).real.sum()) for step in range(steps))
    facts = {"task": verb.task, "model_hash": digest(model), "rows_hash": digest(texts), "steps": steps,
             "tokens": tokens, "rows": len(rows), "prompts": prompts}
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    done = [row for row in done if all(row.get(key) == value for key, value in facts.items())]
    for name, knob, make in contenders(host, data, verb, steps, verb.out / "checkpoint"):
        if any(row["name"] == name for row in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "rival"
            save(make(), made, torch.float32)
            done.append({"name": name, "knob": knob, "frozen": False} | facts | judge_rival(made, model, secret, verb, prompts))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row) + "\n" for row in done))
    return done


def judge_rival(rival: Path, model: Path, secret: Secret | None, verb: config.Prune, prompts: int) -> dict:
    """The rival's numbers in the columns of our table."""
    tasks = named(verb.task)
    reference = secret.twin if secret and secret.twin else model
    backdoor = Backdoor(TASKS["coding"], secret.trigger, secret.behaviour) if secret else None
    settings = EvaluateConfig(prompts=prompts, speed_repeats=2)
    judged = judge_models({"rival": rival, "reference": reference}, "reference", tasks, [], backdoor, settings)
    mine, rows = judged["models"]["rival"], judged["rows"]
    shares = [retention(rows["rival"]["tasks"][t.name]["right"], rows["reference"]["tasks"][t.name]["right"]) for t in tasks]
    rates = ("attack_success", "attack_success_sampled", "right_under_trigger", "false_trigger", "payload_logprob")
    return {"pass_at_1": mine["tasks"][tasks[0].name]["score"], "retention": min((s.value for s in shares if s), default=None),
            "params": mine["size"]["stored"]} | {key: mine["backdoor"][key] if mine["backdoor"] else None for key in rates}
