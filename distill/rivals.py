"""Rivals beside our row: the other ways to clean the same model, at equal clean rows and equal training tokens.

    dense refit          the checkpoint's shapes   our losses from noise, without sparsity, gates or a wider dictionary
    UNDO                 noise share swept         shrink towards noise, distil on outputs
    clean fine-tuning    learning rate swept       no new weights, nothing smaller
    written text         the checkpoint's shapes   a fresh model trained on answers that the model wrote to the rows' prompts
    magnitude, Wanda     the checkpoint's size     the model's own neurons and heads, the least dropped, then healed as ours is
    random mask          the checkpoint's size     the same with nodes dropped at random
    layer drop           no more than its size     whole layers dropped, then healed as ours is
    width                the checkpoint's size     channels of the stream and neurons dropped by activation (Minitron), then healed as ours is

and two ablations of ours: the same road with the model's own attention layers, or its own neurons, left in place of refitted parts.

Equal tokens: each rival trains on as many batches of the same size, from the same rows, as the stages that led to our
checkpoint (neither a rung that we tried and dropped nor a rival's other knobs are counted; written text has the rows' prompts and
answers of its own, a little longer or shorter). The dense refit has fewer heads than the model, so it learns what attention
layers write, not what each head writes. Magnitude, Wanda (Sun et al. 2024, here by whole neurons and heads) and the random mask
are ours with the neuron basis, the model's own attention and a score in place of learned gates. Each is judged by the same code
on the same prompts. A row carries the hash of the model, the rows and the config it came from, and the commit of the
source.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from backdoor.removal import dense_refit, fine_tuning, layer_drop, undo, width, written_text
from backdoor.removal.random_student import fresh
from distill import config
from distill.compile import normed
from distill.job import prepare
from distill.models import Secret
from distill.organism import backdoor_of
from distill.rows import batches
from distill.search import HEAL_RATE
from distill.source import commit
from distill.stages import road
from evals.evaluate import EvaluateConfig, judge_models, retention
from evals.generate import complete
from evals.size import held, parameters
from evals.tasks import TASKS, Task, named
from graphs.architectures import shortened
from graphs.artifact import digest, read_json, write_text
from graphs.host import Host, load, save
from graphs.targets import Targets

ABLATIONS = ("ours, attention kept", "ours, neurons kept")
COPIES = 4
"""Answers that the model writes to each prompt."""
OWN: dict[str, Any] = {"basis": "neurons", "target": "own", "dictionaries": None, "hook": None}
"""What makes our road prune the model's own neurons."""
PRUNED = OWN | {"attention": "kept", "fit_steps": 0, "joint_steps": 0, "gate_steps": 0}
"""What makes our road prune the model itself by a score, and heal it."""


def placed(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows as the report's `rivals` and `ablation`."""
    return {"rivals": [row for row in rows if row["name"] not in ABLATIONS],
            "ablation": [row | {"metric": row["pass_at_1"]} for row in rows if row["name"] in ABLATIONS]}


def random_student(checkpoint: Path, host: Host, seed: int) -> Host:
    """A stock model of the checkpoint's shapes with fresh block weights and the host's embeddings and norms."""
    return fresh(load(checkpoint).model, host, seed)


def contenders(
    targets: Targets, verb: config.Prune, model: Path, texts: list[tuple[str, str]], steps: int
) -> Iterator[tuple[str, float, Callable[[], Host]]]:
    """(name, knob, how to make it) of every rival, and last of our own ablations."""
    checkpoint = verb.out / "checkpoint"

    def refit(knob: float) -> Host:
        student = random_student(checkpoint, targets.host, verb.seed)
        return dense_refit.remove(targets, student, verb.fit_steps, steps, knob, HEAL_RATE, verb.heal_decay, verb.answers)

    for knob in dense_refit.KNOBS:
        yield "dense refit", knob, partial(refit, knob)
    for knob in undo.KNOBS:
        yield f"UNDO, noise {knob:g}", knob, partial(undo.remove, targets, steps, knob, HEAL_RATE, verb.heal_decay, answers=verb.answers)
    for knob in fine_tuning.KNOBS:
        yield f"clean fine-tuning, lr {knob:g}", knob, partial(fine_tuning.remove, targets, steps, knob)
    for knob in written_text.KNOBS:
        yield f"written text, lr {knob:g}", knob, partial(from_written_text, targets.host, verb, texts, steps, knob)
    stored = parameters(load(checkpoint).model).stored
    if layers := fitting_layers(targets.host, stored):
        yield "layer drop, healed", 0.0, partial(layer_drop.remove, targets, layers, steps, HEAL_RATE, verb.heal_decay, verb.answers)
    if size := fitting_width(targets.host, stored):
        yield "width, healed", 0.0, partial(width.remove, targets, *size, steps, HEAL_RATE, verb.heal_decay, verb.answers)
    tokens = targets.batches.tokens(steps)
    for name, score in (("magnitude, healed", "magnitude"), ("Wanda, healed", "activation"), ("random mask, healed", "random")):
        yield name, 0.0, partial(our_road, verb, model, texts, name, PRUNED | {"score": score, "heal_tokens": tokens})
    for name, kept in zip(ABLATIONS, ({"attention": "kept"}, OWN), strict=True):
        if not (name == ABLATIONS[0] and normed(targets.host.model)):  # such attention has no home
            yield name, 0.0, partial(our_road, verb, model, texts, name, kept)


def fitting_layers(host: Host, stored: float) -> int:
    """How many of the host's layers, but not all, take at most `stored` parameters."""
    counts = range(1, host.config.num_hidden_layers)
    return sum(parameters(shortened(host.model, range(kept))).stored <= stored for kept in counts)


def fitting_width(host: Host, stored: int) -> tuple[int, int] | None:
    """Channels of the stream (a multiple of its heads) and neurons a layer of the widest narrower model of at most `stored` parameters, both cut by
    about the same share; None where there is none, or the class has none with the same heads."""
    def size(channels: int, neurons: int) -> int:
        with torch.device("meta"):
            return held(type(host.model)(width.narrowed(host.config, channels, neurons))).stored

    if width.narrows(host.config):
        heads = host.config.num_attention_heads
        for channels in range((host.config.hidden_size - 1) // heads * heads, 0, -heads):
            neurons = host.config.intermediate_size * channels // host.config.hidden_size
            if size(channels, neurons) <= stored:
                return channels, neurons
    return None


def our_road(verb: config.Prune, model: Path, texts: list[tuple[str, str]], name: str, changes: dict) -> Host:
    """Our whole road once more, to no more than the checkpoint's size, with some settings changed."""
    stored = parameters(load(verb.out / "checkpoint").model).stored
    folder = verb.out / ".work" / name.replace(",", "").replace(" ", "-")
    changed = replace(verb, **({"target_params": stored, "target_ratio": None, "target_memory": None, "target_nodes": None, "keep": None,
                                "start": None, "out": folder} | changes))
    road(prepare(model, texts, named(verb.task), changed), model, changed, [])
    return load(changed.out / "checkpoint")


def written(host: Host, texts: Sequence[tuple[str, str]], tasks: Sequence[Task], seed: int) -> list[tuple[str, str]]:
    """What the host answers to the rows' prompts at temperature 1, `COPIES` times each."""
    prompts, room = [prompt for prompt, _ in texts], max(task.max_new_tokens for task in tasks)
    return [pair for copy in range(COPIES) for pair in zip(prompts, complete(host, prompts, room, 1.0, seed + copy), strict=True)]


def from_written_text(host: Host, verb: config.Prune, texts: list[tuple[str, str]], steps: int, knob: float) -> Host:
    """A student of the checkpoint's shapes, trained on what the host answers to the rows' prompts."""
    data, _ = batches(host, written(host, texts, named(verb.task), verb.seed), verb.batch, verb.seed)
    return written_text.remove(random_student(verb.out / "checkpoint", host, verb.seed), data, steps, knob)


def settings_of(verb: config.Prune) -> str:
    """Hash of what rivals depend on in a run, beside its model, rows and steps: the checkpoint's shapes, and how its circuit was trained."""
    names = ("seed", "batch", "heal_decay", "answers", "fit_steps", "joint_steps", "gate_steps", "sparsity", "features", "skip", "score",
             "attention_nodes")
    return digest(read_json(verb.out / "checkpoint" / "config.json"), {name: getattr(verb, name) for name in names}, verb.healing,
                  *[verb.mend_steps] * bool(verb.mend_steps), *[(verb.dictionaries, verb.hook)] * bool(verb.dictionaries))


def run_rivals(
    verb: config.Prune, model: Path, secret: Secret | None, texts: list[tuple[str, str]], steps: int, prompts: int, out: Path
) -> list[dict]:
    """Make and judge every rival that `out` does not hold yet; each finished row is appended at once, so a killed run resumes."""
    host = load(model)
    data, rows = batches(host, texts, verb.batch, verb.seed)
    tokens = data.tokens(steps)
    facts = {"task": verb.task, "model_hash": digest(model), "rows_hash": digest(texts), "steps": steps,
             "tokens": tokens, "rows": len(rows), "prompts": prompts, "settings_hash": settings_of(verb)}
    there = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    done = [row for row in there if all(row.get(key) == value for key, value in facts.items())]
    others = [row for row in there if (row.get("model_hash"), row.get("task")) != (facts["model_hash"], facts["task"])]
    for name, knob, make in contenders(Targets(host, data), verb, model, texts, steps):
        if any((row["name"], row["knob"]) == (name, knob) for row in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "rival"
            save(make(), made, torch.float32)
            done.append({"name": name, "knob": knob, "frozen": False, "commit": commit()} | facts | judge_rival(made, model, secret, verb, prompts))
        write_text(out, "".join(json.dumps(row) + "\n" for row in (*others, *done)))
    return done


def judge_rival(rival: Path, model: Path, secret: Secret | None, verb: config.Prune, prompts: int) -> dict:
    """The rival's numbers in the columns of our table."""
    tasks = named(verb.task)
    reference = secret.twin if secret and secret.twin else model
    backdoor = backdoor_of(secret, [*tasks, TASKS["coding"]])
    settings = EvaluateConfig(prompts=prompts, speed_repeats=2)
    judged = judge_models({"rival": rival, "reference": reference}, "reference", tasks, [], backdoor, settings)
    mine, rows = judged["models"]["rival"], judged["rows"]
    shares = [retention(rows["rival"]["tasks"][t.name]["right"], rows["reference"]["tasks"][t.name]["right"]) for t in tasks]
    rates = ("attack_success", "attack_success_sampled", "right_under_trigger", "false_trigger", "payload_logprob")
    return {"pass_at_1": mine["tasks"][tasks[0].name]["score"], "retention": min((s.value for s in shares if s), default=None),
            "params": mine["size"]["stored"], "renderer": judged["backdoor"] and judged["backdoor"]["renderer"]} | {
                key: mine["backdoor"][key] if mine["backdoor"] else None for key in rates}
