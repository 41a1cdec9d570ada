"""`distill enforce`: run a model within what clean text has shown, without changing a weight.

    distill enforce fit --model DIR --limits LIMITS                    learns the ranges, says what they cost on held-out clean rows
    distill enforce judge --model DIR --limits LIMITS                  the model with and without, against the clean twin where there is one
    distill enforce write --model DIR --limits LIMITS --asked FILE     a JSON line for each prompt: the answer, and what was held
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from distill.config_enforce import Enforce
from distill.edges import page
from distill.models import find, read_secret, secret_beside
from distill.prompts import lines, texts
from distill.rows import batches, clean, tune_rows
from evals.evaluate import Backdoor, EvaluateConfig, judge_models
from evals.generate import complete, prompt_ids
from evals.statistics import ratio
from evals.tasks import TASKS, named
from graphs.artifact import digest, read_json, whole, write_json
from graphs.batches import Encoded, Epochs, encode
from graphs.enforce import Enforced, Limits, Tally, learn
from graphs.host import Host, load
from graphs.losses import divergence
from graphs.replace import Replacement, from_noise

BATCH = 24
"""Rows of a batch that ranges are learnt from."""
TUNE = 96
"""Held-out clean rows of each task that fit reports the cost on."""
SHOWN = 3
"""Values that write names for a prompt."""


def run(verb: Enforce) -> int:
    """Fit, judge or write."""
    if verb.action == "fit":
        return _fit(verb)
    enforced = opened(verb)
    if verb.action == "judge":
        judged = judge(verb, enforced)
        print(json.dumps({key: value for key, value in judged.items() if key != "rows"}, indent=1) if verb.json else page(judged, "the model"))
        return 0
    for record in answers(enforced, asked(verb), verb.new_tokens):
        print(json.dumps(record), flush=True)
    return 0


def own(host: Host) -> Replacement:
    """The model as a replacement by its own neurons and attention, which reproduces it."""
    made = from_noise(host, 0, 0, attention="kept", basis="neurons")
    made.eval()
    return made


def _fit(verb: Enforce) -> int:
    """Learn from clean rows and say what it costs on others."""
    if verb.few < 1:
        raise ValueError(f"--few {verb.few}: give at least 1")
    model, tasks = find(verb.model), named(verb.task)
    host = load(model)
    data, rows = batches(host, clean(verb.rows, tasks), BATCH, 0)
    replacement = own(host)
    limits = learn(replacement, list(data.once()), verb.few, not verb.values_only, verb.history)
    facts = {"model": verb.model, "weights": digest(model), "task": verb.task, "rows": len(rows), "few": verb.few, "values only": verb.values_only,
             "history": verb.history}
    with whole(verb.limits) as out:
        limits.save(out, facts)
        write_json(out / "receipt.json", {"key": digest(facts), "config": verb})
    held = encode(host.tokenizer, [(row.prompt, row.completion) for rows in tune_rows(tasks, TUNE).values() for row in rows],
                  host.config.max_position_embeddings)
    beyond, kl = cost(host, Enforced(replacement, limits), held)
    print(f"limits in {verb.limits}: {limits.tokens:,} clean tokens, {int((limits.row > 0).sum()):,} tokens with a range of their own, "
          f"{int((~limits.known).sum()):,} never seen; {len(limits.history.choice):,} rules of history; "
          f"on {len(held)} held-out clean rows {beyond:.3%} of the values are beyond their range, and "
          f"holding them there costs KL {kl:.4f} nats a token of the answers")
    return 0


@torch.no_grad()
def cost(host: Host, enforced: Enforced, rows: Sequence[Encoded]) -> tuple[float, float]:
    """Share of the values that are held on these rows, and KL from the model, nats a token of their completions: what a prompt goes on with is
    nobody's choice."""
    data, enforced.tally, kls = Epochs(rows, BATCH, host.tokenizer.eos_token_id, 0), Tally(), []
    for step in range(max(1, len(rows) // BATCH)):
        batch = data(step)
        kls.append(float(divergence(enforced(batch.ids), host.model(input_ids=batch.ids).logits, batch, 0.0)))
    share, enforced.tally = enforced.tally.share, None
    return share, sum(kls) / len(kls)


def opened(verb: Enforce) -> Enforced:
    """The model within the limits that were fitted on it. Raises ValueError where there are none, or they are another model's."""
    if not (verb.limits / "limits.json").is_file():
        raise ValueError(f"--limits {verb.limits}: there are no limits; run distill enforce fit --limits {verb.limits} first")
    model = find(verb.model)
    if read_json(verb.limits / "limits.json")["weights"] != digest(model):
        raise ValueError(f"--limits {verb.limits}: they were fitted on another model than --model {verb.model}; run distill enforce fit again")
    return Enforced(own(load(model)), Limits.load(verb.limits))


def judge(verb: Enforce, enforced: Enforced) -> dict:
    """The model as it is and within its limits, on the same rows, against its clean twin where there is one."""
    model, tasks = find(verb.model), named(verb.task)
    folder = verb.secret or secret_beside(model)
    secret = read_secret(folder) if folder else None
    backdoor = Backdoor(TASKS["coding"], secret.trigger, secret.behaviour) if secret and TASKS["coding"] in tasks else None
    models: dict[str, Host | Path] = {"twin": secret.twin} if secret and secret.twin else {}
    models |= {"model": model, "enforced": enforced.host()}
    judged = judge_models(models, next(iter(models)), tasks, [], backdoor, EvaluateConfig(prompts=verb.prompts, other_prompts=min(200, verb.prompts)))
    slower = ratio(judged["rows"]["model"]["speed"], judged["rows"]["enforced"]["speed"]).to_json()
    return judged | {"edges": None, "slower": slower}


def asked(verb: Enforce) -> Iterator[str]:
    """The prompts of --asked, or of standard input."""
    return texts(sys.stdin if verb.asked is None else lines(verb.asked, "--asked"), "--asked")


def answers(enforced: Enforced, prompts: Iterable[str], new_tokens: int) -> Iterator[dict]:
    """For each prompt what the model writes within its limits; what share of the prompt's values was held, and the farthest."""
    host = enforced.host()
    for prompt in prompts:
        (ids,) = prompt_ids(host, [prompt])
        if not ids:
            raise ValueError("--asked: a prompt is empty; give some text")
        (text,) = complete(host, [prompt], new_tokens)
        tally = enforced.held(torch.tensor(ids))
        yield {"prompt": prompt, "answer": text, "beyond": tally.share, "unknown": [place for place, token in enumerate(ids) if not
               bool(enforced.limits.known[token])], "held": [asdict(one) | {"line": one.line()} for one in tally.farthest(SHOWN)]}
