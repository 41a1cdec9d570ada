"""A finished run, opened again from its folder alone: its model, its rows, the graph it fitted and the circuit it kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch.nn import Module

from distill import config, synthetic
from distill.models import downloaded, find
from distill.rows import batches
from evals.generate import prompt_ids
from evals.tasks import named
from graphs import zoo
from graphs.architectures import attention_components, neurons, post_norm
from graphs.artifact import digest, locked, read_json, stage
from graphs.batches import Batch, Epochs
from graphs.canonical import canonical
from graphs.components import Components
from graphs.dictionary import Dictionary, nothing
from graphs.edges import Reconstruction
from graphs.flow import FORMAT, build
from graphs.graph import FeatureGraph
from graphs.host import Host, load
from graphs.replace import Replacement

CLUSTER = 8
"""Rows a cluster, for the standard errors of flow."""


@dataclass(frozen=True)
class Opened:
    """One part of a run, ready to be read. model: what the run began with; replacement: the part itself, None of a bare model; data: the
    run's clean rows; key: hash of what it was made of.

    `circuit` (kept and healed, what was compiled) is read as it runs: nothing of the original model is left between embedding
    and unembedding, and no site has an error. `graph` (everything fitted) is read inside the original model, whose sites
    have errors: what the dictionaries do not reproduce.
    """

    folder: Path
    part: str
    model: Host
    subject: Reconstruction
    replacement: Replacement | None
    data: Epochs | None
    key: str

    def ids(self, text: str, flag: str) -> list[int]:
        """A prompt as this model reads it. Raises ValueError where there is no token, or more than the context holds."""
        (ids,), limit = prompt_ids(self.subject.host, [text]), self.subject.host.config.max_position_embeddings
        if not ids:
            raise ValueError(f"{flag}: the prompt is empty; give some text")
        if len(ids) > limit:
            raise ValueError(f"{flag}: a prompt of {len(ids)} tokens does not fit the model's context of {limit}; shorten it")
        return ids

    def sample(self, rows: int) -> list[Batch]:
        """`rows` clean rows in clusters, always the same ones. Raises ValueError where there are none (a bare model)."""
        if self.data is None:
            raise ValueError("--model: a global graph needs the clean rows of a run; give --run, or --prompt for a prompt's own graph")
        clusters = Epochs(self.data.rows, CLUSTER, self.data.pad, self.data.seed)
        return [clusters(step) for step in range(max(1, min(rows, len(self.data.rows)) // CLUSTER))]

    def edges(self, rows: int, enough: float, memory: int) -> FeatureGraph:
        """The part's edges on `rows` clean rows: built once, found again under RUN/edges/."""
        sample = self.sample(rows)

        def make(out: Path) -> dict:
            made = build(self.subject, sample, enough, memory)
            made.save(out)
            return {"part": self.part, "rows": rows, "enough": enough, "edges": len(made.src), "tokens": made.tokens}

        folder = self.folder / "edges" / self.part
        with locked(self.folder):
            stage(folder, digest(self.key, rows, enough, FORMAT), make)
        return FeatureGraph.load(folder)


def inspected(verb: config.Inspect) -> Opened:
    """What the verb's flags name: part of a run, or a model."""
    if verb.model is None:
        if verb.dictionaries != "neurons" or verb.hook is not None:
            raise ValueError("--dictionaries and --hook belong to --model: give the model that the dictionaries were made for")
        return reopen(verb.run, verb.part)
    plain = type(verb)()
    for name in ("run", "part"):
        if getattr(verb, name) != getattr(plain, name):
            raise ValueError(f"--{name} belongs to a run, and --model was given too: give one of them")
    return bare(verb.model, verb.dictionaries, verb.hook)


def bare(name: str, dictionaries: str, hook: str | None) -> Opened:
    """A model with its own attention components, and its own neurons or published transcoders. Sites without one are all error."""
    host = load(find(name))
    if dictionaries == "neurons" and post_norm(host.model, host.sites[1]) is not None:
        raise ValueError(f"--model {name}: a norm scales what its MLPs write, so its neurons have no fixed write vectors; give --dictionaries DIR")
    read = {} if dictionaries == "neurons" else zoo.load(downloaded(dictionaries), host, hook)
    basis: dict[str, Dictionary | Components] = {}
    for site in host.sites:
        if site.kind == "attention":
            basis[site.name] = attention_components(host.model, site)
        elif dictionaries == "neurons":
            basis[site.name] = neurons(host.model, site)
        else:
            basis[site.name] = read.get(site.name) or nothing(site.d_in, site.d_out)
    return Opened(Path(name), dictionaries, host, Reconstruction(host, basis), None, None, "")


def settings_of(folder: Path, flag: str = "--run") -> config.Prune:
    """A finished run's settings. Raises ValueError where there is no finished run."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder; give the --out of a distill prune")
    if not (folder / "receipt.json").is_file():
        raise ValueError(f"{flag} {folder}: the run has not finished (it has no receipt.json); start the same command again")
    return config.Prune(**config.from_mapping(config.Prune, read_json(folder / "receipt.json")["config"], str(folder / "receipt.json")))


def begun(folder: Path) -> tuple[config.Prune, Host, Epochs]:
    """A finished run's settings, the model it began with and its clean rows. Raises ValueError where there is no finished run."""
    settings = settings_of(folder)
    model = find(settings.model)
    host = load(model)
    data, _ = batches(host, synthetic.rows(replace(settings, out=folder), model, named(settings.task)), settings.batch, settings.seed)
    return settings, host, data


def reopen(folder: Path, part: str) -> Opened:
    """Open `part` of the run in `folder`. Raises ValueError (one sentence) where it is not there."""
    if folder.is_dir() and not (folder / part / "receipt.json").is_file():
        raise ValueError(f"--run {folder}: it holds no {part}/; run distill prune --out {folder} first")
    _, host, data = begun(folder)
    replacement = Replacement.load(folder / part, host)
    replacement.eval()
    canonical(replacement, data)
    stand_ins: dict[str, Module] = dict(replacement.attention())
    subject = Reconstruction(replacement.host(), replacement.basis()) if part == "circuit" else Reconstruction(host, replacement.basis(), stand_ins)
    return Opened(folder, part, host, subject, replacement, data, read_json(folder / part / "receipt.json")["key"])
