"""Every way of removing in the grid, by name: (model folder, clean rows, batches to train on, knob, seed) -> a new model.

All methods of the bench train on the same batches, as many of them, of the same clean rows; `written text` has the rows' prompts and
answers that the model wrote. Ours is the main command's own road (`distill.stages.road`) to a fixed share of the parameters, so that no rung
of a search is trained beside. Its knob is the weight decay of healing, which its strength turns on (LOG.md), and UNDO and the dense refits,
which heal as it does, heal at the decay that was frozen for it.

    ours                 transcoders and attention from noise, gates, pruned, healed
    ours, neurons        the model's own neurons instead of transcoders
    ours, layers         whole layers and heads dropped
    ours, attention kept, ours, no healing, ours, no pruning, ours, random graph      one part of the method left out
    ours, own parts      both left in place, pruned by gates and healed
    dense refit          the model's own shapes from noise, our losses
    dense refit, our size    our checkpoint's shapes from noise, our losses: what the graph adds
    magnitude, Wanda, random mask    the model's own neurons and heads dropped by a score to our size, healed as ours is

Any of these and of the rivals may go by NAME, synthetic rows: the same on as many batches of the clean rows and of `WRITTEN` more that the
suspect model writes itself (`distill.synthetic`), at the same knob.

Or by NAME, seen tokens: the same on a model to which every token that the *clean* rows do not hold is the same one (`graphs.tokens`; what the
suspect writes vouches for none); `seen tokens` is that alone, and trains nothing. What a payload's own tokens carry is gone then, whatever
became of the rest: relearning tells the two apart only where the payload is written in tokens that clean rows hold.

The oracles are handed poisoned rows, which no defender has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from backdoor.removal import dense_refit
from backdoor.removal.removal import oracles, rivals
from distill import config, synthetic
from distill.job import prepare
from distill.rivals import PRUNED, random_student, written
from distill.rows import batches
from distill.search import HEAL_RATE
from distill.stages import road
from evals.tasks import TASKS
from graphs.artifact import read_json
from graphs.batches import Batch, Epochs, encode
from graphs.host import Host, load
from graphs.targets import Targets
from graphs.tokens import merge_others, seen_in

SIZE = 0.6
"""Share of the model's stored parameters (embeddings apart) that our road is asked for."""
BATCH = 24
DECAYS = (0.7, 0.35, 1.4)
KNOBS_FILE = Path(__file__).parent / "knobs.json"
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, neurons": {"basis": "neurons", "target": "own"},
    "ours, layers": {"basis": "layers", "target": "own"},
    "ours, attention kept": {"attention": "kept"},
    "ours, own parts": {"basis": "neurons", "attention": "kept", "target": "own", "fit_steps": 0, "joint_steps": 0},
    "ours, no healing": {"heal_tokens": 0},
    "ours, no pruning": {"target_ratio": 9.0},
    "ours, random graph": {"score": "random", "gate_steps": 0},
    "magnitude": PRUNED | {"score": "magnitude"},
    "Wanda": PRUNED | {"score": "activation"},
    "random mask": PRUNED | {"score": "random"},
}
REFIT = "dense refit, our size"
SYNTHETIC = ", synthetic rows"
ALONE = "seen tokens"
SEEN = f", {ALONE}"
WRITTEN = 3584
"""Rows that the model writes."""
WITH_SYNTHETIC = tuple(name + SYNTHETIC for name in ("ours", "ours, own parts", "dense refit", "UNDO", "clean fine-tuning"))
"""What suites ask for of such methods."""
WITH_SEEN = (ALONE, *(name + SYNTHETIC + SEEN for name in ("ours, own parts", "dense refit", "UNDO")))
"""The same of those on seen tokens."""


@dataclass(frozen=True)
class Setting:
    """What a removal is given. model: the suspect's folder; texts: the defender's clean rows; steps: batches; seed: of all that is drawn;
    folder: where a road keeps its work; and made when they are asked for: poisoned, rows for the oracles alone; ours, our checkpoint for the
    same cell; synthetic, rows that the model writes; seen: whether tokens that the clean rows do not hold are one; clean: how many of the texts,
    the first, are the defender's, where the model wrote the others."""

    model: Path
    texts: Sequence[tuple[str, str]]
    steps: int
    seed: int
    folder: Path
    poisoned: Callable[[], list[tuple[str, str]]]
    ours: Callable[[], Path]
    synthetic: Callable[[], list[tuple[str, str]]]
    seen: bool = False
    clean: int | None = None


def knobs() -> dict[str, dict]:
    """The frozen knobs by method, with what they were chosen on."""
    return read_json(KNOBS_FILE)["methods"] if KNOBS_FILE.is_file() else {}


def frozen(method: str) -> float | None:
    """The knob a method runs with: its own, or, for ours and what heals as ours does, the decay of ours. None where none is frozen yet."""
    return 1.0 if method == ALONE else knobs().get(tuned(method), {"knob": None})["knob"]  # rows that a token must stand in: not tuned


def tuned(method: str) -> str:
    """The method whose knob this one takes."""
    method = method.removesuffix(SEEN).removesuffix(SYNTHETIC)
    return "ours" if method in OURS else "dense refit" if method == REFIT else method


def unfrozen(methods: Iterable[str]) -> list[str]:
    """Those of the methods that have no frozen knob yet, each once."""
    return [name for name in dict.fromkeys(methods) if frozen(name) is None]


def decay() -> float:
    """The weight decay of healing: the one frozen for ours, and before that is chosen the main command's."""
    return knobs().get("ours", {"knob": config.Prune.heal_decay})["knob"]


def depends(method: str) -> Any:
    """What a method's model depends on beside its cell: constants and settings, and the decay that is frozen for ours."""
    for suffix, more in ((SEEN, (ALONE,)), (SYNTHETIC, (WRITTEN, synthetic.LONGEST))):
        if method.endswith(suffix):
            return depends(method.removesuffix(suffix)), *more
    return SIZE, BATCH, HEAL_RATE, OURS.get(method), None if method in OURS else decay()


def tried(method: str) -> tuple[float, ...]:
    """The three knobs that are tried on development families."""
    if method in OURS:
        return DECAYS
    return next(one.knobs for one in (*rivals(HEAL_RATE, decay(), _no_batch), *oracles(_no_batch)) if one.name == method)


def _no_batch(step: int) -> Batch:
    raise AssertionError("a method's name was asked for, not its batches")


def names() -> tuple[str, ...]:
    """All methods, blind ones first."""
    blind = [one.name for one in rivals(HEAL_RATE, decay(), _no_batch)]
    return (*OURS, REFIT, *blind, *(one.name for one in oracles(_no_batch)))


def remove(method: str, setting: Setting, knob: float) -> Host:
    """The model that the method makes. Raises ValueError for a method that there is not."""
    if method.endswith(SEEN):
        return remove(method.removesuffix(SEEN), replace(setting, seen=True), knob)
    if method.endswith(SYNTHETIC):
        method, setting = method.removesuffix(SYNTHETIC), replace(
            setting, texts=[*setting.texts, *setting.synthetic()], clean=len(setting.texts))
    if method in OURS:
        return _road(method, setting, knob)
    host = load(setting.model)
    data, rows = batches(host, setting.texts, BATCH, setting.seed)
    if setting.seen or method == ALONE:
        merge_others(host, seen_in(rows[: setting.clean], host))
    if method == ALONE:
        return host
    targets = Targets(host, data)
    if method == REFIT:
        student = random_student(setting.ours(), host, setting.seed)
        return dense_refit.remove(targets, student, setting.steps // 2, setting.steps, knob, HEAL_RATE, decay())
    written_rows, poisoned = (_once(partial(make, host, setting)) for make in (_written, _poisoned))
    known = {one.name: one for one in (*rivals(HEAL_RATE, decay(), written_rows), *oracles(poisoned))}
    if method not in known:
        raise ValueError(f"no removal method {method!r}: choose from {', '.join(names())}")
    return known[method].remove(targets, setting.steps, knob, seed=setting.seed)


def _once(make: Callable[[], Epochs]) -> Callable[[int], Batch]:
    """Batches that are made when the first is asked for: only one method does."""
    made: list[Epochs] = []

    def batch(step: int) -> Batch:
        if not made:
            made.append(make())
        return made[0](step)

    return batch


def _written(host: Host, setting: Setting) -> Epochs:
    return batches(host, written(host, setting.texts, [TASKS["coding"]], setting.seed), BATCH, setting.seed)[0]


def _poisoned(host: Host, setting: Setting) -> Epochs:
    return Epochs(encode(host.tokenizer, setting.poisoned()), BATCH, host.tokenizer.eos_token_id, setting.seed)


def road_settings(method: str, setting: Setting, knob: float) -> config.Prune:
    """Our road to `SIZE`, with what the other stages leave of the batches for healing: of the batches a quarter fits, a
    sixteenth joins and a twentieth gates. The model alone is followed, as in all methods that follow it here."""
    share = setting.steps / config.Prune(task="coding").fit_steps / 4
    stages = {name: round(getattr(config.Prune, name) * share) for name in ("fit_steps", "joint_steps", "gate_steps")}
    verb = replace(config.Prune(model=str(setting.model), out=setting.folder, batch=BATCH, seed=setting.seed, heal_decay=knob, heal_answers=0.0,
                                target_ratio=SIZE, tune_rows=1, tokens="seen" if setting.seen else "all"), **stages)
    return replace(verb, **OURS[method])


def _road(method: str, setting: Setting, knob: float) -> Host:
    verb = road_settings(method, setting, knob)
    job = prepare(setting.model, setting.texts, [TASKS["coding"]], verb, setting.clean)
    if verb.heal_tokens is None:
        left = job.data.tokens(setting.steps) - job.data.tokens(verb.fitting + verb.gate_steps)
        verb = replace(verb, heal_tokens=left)
        job = replace(job, verb=verb)
    road(job, setting.model, verb, [])
    return load(verb.out / "checkpoint")
