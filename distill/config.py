"""The verbs' configurations: frozen, torch-free dataclasses that become flags, help, YAML and the saved receipt.

A field's docstring is its help text. `--config file.yaml` sets fields, flags override the file, unknown keys are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class Fit:
    """Fit the graph: transcoders and attention for every layer, from noise (transcoders: or from published ones), on clean rows."""

    model: str = "builtin:organism"
    """builtin:organism, builtin:organism-rare, builtin:twin, builtin:base, a model folder, or a hub id (owner/name)."""
    task: str = "coding"
    """One task or several (coding,math): coding, math, stories, or a file: humaneval:PATH, mbpp:PATH, gsm8k:PATH, svamp:PATH, jsonl:PATH
    (prompt; answer or tests), text:PATH; with gsm8k@MODEL:PATH (svamp, jsonl) questions are asked in MODEL's chat template."""
    out: Path = Path("runs/default")
    """Run folder."""
    rows: Path | None = None
    """A table of clean rows (parquet); by default the 4,096 rows that ship with the package."""
    dictionaries: str | None = None
    """Start from published transcoders instead of noise: a folder or a hub id. --features of each layer are taken, those that write most on the
    clean rows, and --skip directions of their linear skip."""
    hook: str | None = None
    """What those transcoders read, whatever their files say (mlp.hook_in, ln2.hook_normalized)."""
    features: int = 512
    """Transcoder features a layer (--basis features)."""
    fit_steps: int = 400
    """Batches of the local fit (each site alone)."""
    joint_steps: int = 100
    """Batches of the end-to-end fit (all sites swapped in)."""
    mend_steps: int = 0
    """Batches of fitting further, at equal L0, the one site whose error costs most by itself (understand --part graph --holes shows it)."""
    sparsity: float = 2e-3
    """Weight of the sparsity penalty (--basis features)."""
    basis: Literal["features", "neurons", "layers"] = "features"
    """What stands for MLPs: sparse transcoders fitted from noise, or the model's own neurons, pruned but not refitted; layers: all neurons
    stay, and whole layers are dropped beside heads."""
    skip: int = 0
    """Rank of a linear skip in each transcoder (never pruned; compiles into two units a rank)."""
    attention: Literal["refit", "kept"] = "refit"
    """Refit attention from noise, or keep the model's own (an ablation)."""
    batch: int = 24
    """Rows a batch."""
    synthetic_rows: int = 0
    """Rows that the model itself writes, prompts and answers at temperature 1, beside the clean rows: where these are few (distill/synthetic.py)."""
    seed: int = 0
    """Seed of everything random."""

    @property
    def fitting(self) -> int:
        """Batches before any gate."""
        return self.fit_steps + self.joint_steps + self.mend_steps


@dataclass(frozen=True)
class Prune(Fit):
    """Prune to a task's circuit, heal, compile to a stock checkpoint, judge it."""

    start: Path | None = None
    """Begin with the circuit of this finished run instead of fitting one: its model, rows, graph and gates are taken over, and its circuit
    is pruned further."""
    keep: float | None = None
    """Share of each task's metric that the smallest circuit must keep, on tune and in the report; by default .98 of one task's, .95 of several."""
    target_params: int | None = None
    """Instead of --keep: stored parameters (embeddings apart) of the checkpoint."""
    target_ratio: float | None = None
    """Instead of --keep: the same as a share of the model's own, such as .5."""
    target_memory: float | None = None
    """Instead of --keep: MB that all weights take in float32, embeddings included."""
    target_nodes: int | None = None
    """Instead of --keep: nodes in the circuit (features, neurons or layers, and heads or components)."""
    target: Literal["auto", "arcee", "llama", "own"] = "auto"
    """Class of the checkpoint: Arcee, Llama with relu (1.5x the MLP parameters, runs more widely), or the model's own with relu; auto:
    Arcee where the model can move there, else its own."""
    attention_nodes: Literal["heads", "components"] = "heads"
    """What is gated and dropped of attention: whole heads, or the components of heads one by one (a dropped one is stored as zeros)."""
    tokens: Literal["all", "seen"] = "all"
    """Token nodes that are kept: all, or those that the clean rows hold. All others are then one to the model, a word that it hardly knows: what
    was planted in their embeddings is gone, and what the model knew of them."""
    score: Literal["fisher", "attribution", "integrated", "relp", "frequency", "activation", "magnitude", "random"] = "fisher"
    """What ranks nodes before gates are learned from there (distill curve compares them)."""
    gate_steps: int = 80
    """Batches of gate training (0: the score alone ranks the nodes)."""
    heal_tokens: int | None = None
    """Tokens of healing (0: none); by default 1,600,000 for one task, 3,200,000 for several, and after --start a
    tenth of that, or none where the cut costs next to nothing."""
    heal_decay: float = 0.7
    """Weight decay while healing: what clean rows do not ask for fades (LOG.md)."""
    heal_answers: float | None = None
    """Weight, while healing, of the clean rows' own answers beside what the model makes of them (0: the model alone is followed); by default 1, and
    0 with --synthetic-rows."""
    tune_rows: int = 500
    """Rows of the tune split that each candidate size is judged on."""
    prompts: int = 500
    """Held-out prompts for every rate in the report."""
    name: str | None = None
    """Name shown in the report; by default the run folder's."""
    json: bool = False
    """Print the summary as JSON instead of the table."""
    dry_run: bool = False
    """Print the plan (stages, batches, tokens, memory, disk) and write nothing."""

    @property
    def share(self) -> float:
        """The share to keep: `keep`, or its default for as many tasks as are named."""
        return self.keep if self.keep is not None else 0.95 if "," in self.task else 0.98

    @property
    def budget(self) -> tuple[str, float] | None:
        """The budget's flag and limit, where the circuit is chosen by size."""
        return next(((name, value) for name in BUDGETS if (value := getattr(self, name)) is not None), None)

    @property
    def healing(self) -> int:
        """Tokens of healing: `heal_tokens`, or its default for as many tasks as are named."""
        default = (3_200_000 if "," in self.task else 1_600_000) // (10 if self.start else 1)
        return default if self.heal_tokens is None else self.heal_tokens

    @property
    def answers(self) -> float:
        """Weight of the rows' answers while healing: `heal_answers`, or its default."""
        return (0.0 if self.synthetic_rows else 1.0) if self.heal_answers is None else self.heal_answers


@dataclass(frozen=True)
class Evaluate:
    """Judge any model folders with the same code that judges a run."""

    run: Path | None = None
    """A run folder: judge its checkpoint beside its model, twin and rivals again."""
    model: str | None = None
    """Judge one model alone: a folder, builtin name or hub id."""
    reference: str | None = None
    """Model that retention, KL and agreement refer to."""
    task: str = "coding,math,stories"
    """Tasks to judge, as for prune; of a file its test split is judged."""
    secret: Path | None = None
    """Folder with backdoor.json; without it the backdoor numbers are not measured."""
    prompts: int = 500
    """Held-out prompts for every rate."""
    lm_eval: str | None = None
    """Instead of our own tasks: tasks of EleutherAI's lm-evaluation-harness (arc_easy,hellaswag); needs the extra lm-eval."""
    lm_eval_folder: Path | None = None
    """Folder of further tasks for the harness, as YAML files."""
    part: Literal["checkpoint", "circuit", "graph"] = "checkpoint"
    """With --lm-eval and --run: the checkpoint, or the circuit or fitted graph running in the model's place."""
    as_: Annotated[Literal["graph", "edges", "checkpoint"] | None, arg(name="as")] = None
    """With --run: judge its circuit by itself, as the graph that runs node by node, edge by edge with a share of its edges, or as compiled."""
    edges: float = 0.2
    """Share of the edges that are kept (--as edges)."""
    edge_score: Literal["flow", "magnitude", "fisher", "random", "gates"] = "fisher"
    """What ranks edges (--as edges; distill curve --edges compares them)."""
    edge_steps: int = 0
    """Batches of healing while edges are cut, for gates half of them of learning (--as edges); 0: cut at once."""
    rivals: bool = False
    """Also make and judge the rivals (clean fine-tuning, UNDO, dense refit, written text, magnitude, Wanda, ...) at equal rows and tokens."""
    out: Path | None = None
    """Where the rivals' rows go (JSON lines)."""
    seed: int = 0
    """Seed of everything random."""
    json: bool = False
    """Print JSON instead of the table."""


@dataclass(frozen=True)
class Inspect:
    """Read a finished run, or a model with its own neurons or published dictionaries."""

    run: Path = Path("runs/default")
    """Run folder."""
    model: str | None = None
    """Instead of --run: a builtin model, a folder or a hub id of any class whose graph can be built (find, and view --prompt)."""
    dictionaries: str = "neurons"
    """With --model: `neurons` (the model's own), or a folder or hub id of transcoders."""
    hook: str | None = None
    """What those transcoders read, whatever their files say (mlp.hook_in, ln2.hook_normalized)."""
    part: Literal["circuit", "graph"] = "circuit"
    """The circuit that was kept, healed and compiled, or the graph as it was fitted."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Flow(Inspect):
    """What a global graph is measured on."""

    rows: int = 128
    """Clean rows that flow is measured on."""
    enough: float = 0.95
    """Share of each node's absolute drive that the stored parents carry."""
    memory: int = 512
    """MB for flow statistics; less memory means more passes over the rows."""


@dataclass(frozen=True)
class Graph(Flow):
    """How good a run's graph is: fidelity with every site swapped, sparsity, replacement and completeness, parents a node needs."""

    part: Literal["circuit", "graph"] = "graph"
    """The graph as it was fitted, or the circuit that was kept, healed and compiled (which has no errors)."""
    judged: int = 192
    """Rows of each task's tune split that fidelity is measured on."""
    prompts: int = 48
    """Prompts of each task that the scores are means over."""


@dataclass(frozen=True)
class Curve:
    """Compare scores by how much of a task the best nodes carry: faithfulness and KL from none of a run's nodes to all, nothing healed."""

    run: Path = Path("runs/default")
    """Run folder."""
    score: str = "gates,relp,integrated,attribution,fisher,activation,magnitude,frequency,random"
    """Scores to compare, by name; gates: those that the run learned."""
    judged: int = 192
    """Rows of each task's tune split."""
    score_batches: int = 12
    """Batches of clean rows that scores are taken on."""
    edges: bool = False
    """The same of the circuit's edges instead: all scores of edges (flow, magnitude, fisher, random) unless --score names some."""
    answers: int = 0
    """Also compile what the first score keeps of a tenth of the nodes and more, let it answer as many tune rows of each task, and time it."""
    seed: int = 0
    """Seed of the random score."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Explain(Flow):
    """Print what one node of a run computes (distill explain L2.F117), or what a head looks for (L1.H2)."""

    node: str | None = None
    """L2.F117 (a feature), L1.H2.C3 (an attention component), L1.H2 (a head) or "logit ' return'"; may stand right after the verb."""
    parents: int = 8
    """Parents (and children) printed."""
    contexts: int = 5
    """Contexts printed."""


@dataclass(frozen=True)
class View(Flow):
    """Write a run's circuit, or one prompt's graph, as one offline HTML page."""

    prompt: str | None = None
    """Draw what this prompt does instead of the whole circuit; \\n stands for a line break."""
    out: Path | None = None
    """Page to write; by default view.html or prompt.html in the run folder."""
    nodes: int = 3000
    """Most nodes drawn."""
    influence: float = 0.8
    """Share of a prompt's influence that the drawn nodes hold."""
    tracer: Path | None = None
    """Also write the prompt's graph as circuit-tracer's JSON (what Neuronpedia reads)."""


@dataclass(frozen=True)
class Find(Inspect):
    """From prompts that show a trait and prompts that do not, find the nodes that carry it, and prove it by intervention."""

    present: Path | None = None
    """Prompts that show the trait: a text file with one a line (\\n stands for a line break), or JSON lines with a field `prompt`."""
    absent: Path | None = None
    """Prompts that do not, of the same kind otherwise. Best: line by line the same prompt without the trait, of as many tokens."""
    top: int = 5
    """Nodes held together."""
    strength: float | None = None
    """Where nodes are held: 1 as where the trait is absent, 2 as far on the other side as it is present on this; by default the best of
    1, 2, 3 and 4 on half of the prompts."""
    screened: int = 60
    """Candidates tried one at a time."""
    controls: int = 20
    """Random sets of matched nodes."""
    seed: int = 0
    """Seed of the random sets."""


@dataclass(frozen=True)
class Monitor(Inspect):
    """Watch how strangely a model's nodes are driven (distill monitor fit | score | serve): fit learns what is usual from clean text; score
    prints a JSON line for each prompt; serve answers lines on standard input until it ends."""

    action: Literal["fit", "score", "serve"] = "score"
    """May stand right after the verb."""
    monitor: Path | None = None
    """Folder of the monitor; by default RUN/monitor."""
    prompts: Path | None = None
    """Prompts to score: one a line (\\n stands for a line break), or JSON lines with a field `prompt`; by default standard input."""
    part: Literal["circuit", "graph"] = "graph"
    """The graph as it was fitted, inside the model with its errors, or the circuit, which is watched as the model that it is."""
    task: str = "coding"
    """With --model: tasks whose clean rows teach the monitor (a run has its own)."""
    rows: int = 512
    """Clean rows that it learns from."""
    calibration: int = 500
    """Held-out clean prompts of each task's tune split that set the threshold."""
    false_positives: float = 0.01
    """Rate at which clean prompts of that kind may be flagged."""
    ahead: int = 1
    """Tokens that the model writes after a prompt and that belong to its score."""


@dataclass(frozen=True)
class Export:
    """Write a run's circuit as a checkpoint of another class or dtype, with a model card, proven by a reload in a fresh process."""

    run: Path = Path("runs/default")
    """Run folder; may stand right after the verb."""
    target: Literal["auto", "arcee", "llama", "own"] = "auto"
    """Class of the checkpoint, as for prune."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What weights are stored in."""
    vocabulary: Literal["all", "task"] = "all"
    """Rows of the embedding and unembedding: all, or those of the task's tokens with a tokenizer to match (BPE over bytes only); other text
    is then tokenised more coarsely."""
    out: Path | None = None
    """Folder to write; by default RUN/export-TARGET-DTYPE (and -task)."""
    push_to_hub: str | None = None
    """Also upload it to this hub id (owner/name), as a private model; needs a login (hf auth login)."""
    json: bool = False
    """Print JSON."""


BUDGETS = ("target_params", "target_ratio", "target_memory", "target_nodes")
"""Flags that choose the circuit by its size; at most one, and not beside --keep."""
LEAST = {"features": 16, "batch": 1, "tune_rows": 1, "prompts": 1, "fit_steps": 0, "skip": 0, "joint_steps": 0, "mend_steps": 0, "gate_steps": 0,
         "heal_tokens": 0, "answers": 0, "edge_steps": 0, "ordinary_steps": 0, "resistant_steps": 1, "parents": 1, "contexts": 0, "memory": 1,
         "nodes": 1, "top": 1, "screened": 1, "controls": 19, "rows": 16,
         "judged": 32, "calibration": 1, "ahead": 0, "tested": 0, "workers": 1, "target_params": 1, "target_nodes": 1, "score_batches": 1,
         "samples": 1, "synthetic_rows": 0}
"""Smallest value of each numeric field that has one."""


def check(verb: Any) -> None:
    """Raise ValueError, naming the flag, where a number is too small or two flags exclude each other."""
    for name, least in LEAST.items():
        value = getattr(verb, name, None)
        if isinstance(value, int) and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    for name in ("heal_decay", "heal_answers"):
        if (weight := getattr(verb, name, None)) is not None and weight < 0:
            raise ValueError(f"--{name.replace('_', '-')} {weight:g}: give 0 or more")
    if getattr(verb, "synthetic_rows", 0) and getattr(verb, "heal_answers", None):
        raise ValueError("--heal-answers does not go with --synthetic-rows: its rows have answers that the model drew; leave one of them out")
    for name in ("enough", "influence"):
        share = getattr(verb, name, None)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"--{name} {share:g}: give a share above 0 and up to 1")
    basis = getattr(verb, "basis", "features")
    if basis != "features" and verb.dictionaries:
        raise ValueError(f"--dictionaries belongs to --basis features: with --basis {basis} the model's own neurons are the MLP itself; leave it out")
    if getattr(verb, "hook", None) and getattr(verb, "dictionaries", None) is None:
        raise ValueError("--hook says what --dictionaries read: give both, or leave it out")
    if basis != "features" and verb.skip:
        raise ValueError(f"--skip belongs to --basis features: with --basis {basis} the model's own neurons are the MLP itself; leave it out")
    if basis != "features" and verb.attention == "kept" and verb.mend_steps:
        raise ValueError(f"--mend-steps does not go with --basis {basis} --attention kept: every part is the model's own, so none has an error to "
                         "mend; leave it out")
    if basis == "layers" and getattr(verb, "attention_nodes", "heads") == "components":
        raise ValueError("--attention-nodes components does not go with --basis layers, which drops whole heads: give --attention-nodes heads, "
                         "or --basis neurons")
    given = [f"--{name.replace('_', '-')}" for name in ("keep", *BUDGETS) if getattr(verb, name, None) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: give the share to keep or one size, not both")


def from_mapping(verb: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Checked keyword arguments of `verb` from a config file. Raises ValueError on an unknown key."""
    known = {field.name for field in fields(verb)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"--config {where}: unknown key {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    paths = ("out", "rows", "run", "start", "secret", "tracer", "present", "absent", "lm_eval_folder", "monitor", "prompts", "on")
    return {key: Path(value) if key in paths and isinstance(value, str) else tuple(value) if isinstance(value, list) else value
            for key, value in values.items()}
