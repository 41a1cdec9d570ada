"""The one command line: `python -m distill VERB [flags]`.

Nothing heavy is imported before a verb runs, so help is instant. Answers go to stdout, progress to stderr. Exit status:
0 success, 1 a gate failed (the report says which), 2 the input was wrong (one sentence says what and how to mend it).
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from distill import config, config_backdoors, config_doctor, config_enforce, config_experiment, config_hypotheses
from graphs import processes

VERBS = {
    "prune": (config.Prune, "distill.prune"),
    "fit": (config.Fit, "distill.prune"),
    "evaluate": (config.Evaluate, "distill.evaluate"),
    "graph": (config.Graph, "distill.graph"),
    "curve": (config.Curve, "distill.curve"),
    "explain": (config.Explain, "distill.explain"),
    "listing": (config_hypotheses.Listing, "distill.listing"),
    "understand": (config_hypotheses.Understand, "distill.understand"),
    "gate": (config_hypotheses.Gate, "distill.gate"),
    "test": (config_hypotheses.Test, "distill.regress"),
    "view": (config.View, "distill.view"),
    "monitor": (config.Monitor, "distill.monitor"),
    "enforce": (config_enforce.Enforce, "distill.enforce"),
    "find": (config.Find, "distill.find"),
    "export": (config.Export, "distill.export"),
    "plant": (config_backdoors.Plant, "distill.plant"),
    "experiment": (config_experiment.Experiment, "distill.experiment.run"),
    "doctor": (config_doctor.Doctor, "distill.doctor"),
}
POSITIONAL = {"explain": "--node"} | dict.fromkeys(("monitor", "enforce"), "--action") | dict.fromkeys(
    ("listing", "understand", "gate", "test", "export"), "--run")
"""The flag that a verb's first word stands for, where it begins with no dash."""
SHARED = ("fit", "prune", "plant", "evaluate")
"""Verbs whose work several processes share."""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "--version"):
            print(importlib.import_module("distill").__version__ if arguments[:1] == ["--version"] else _overview(), flush=True)
            return 0 if arguments else 2
        verb = arguments.pop(0)
        if verb not in VERBS:
            return _refuse(f"no such verb {verb!r}: choose from {', '.join(VERBS)}")
        chosen = _parse(verb, arguments)
        config.check(chosen)
        _meet(verb)
        status = importlib.import_module(VERBS[verb][1]).run(chosen)
        sys.stdout.flush()
        return status
    except ValueError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # whoever read our answer has enough of it (distill explain ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _refuse(f"the disk is full while writing {error.filename or 'the run folder'}: free some space and start the same command again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            return _refuse(f"cannot write {error.filename}: {str(error.strerror).lower()}; give --out a folder that you may write to")
        raise
    except KeyboardInterrupt:
        print("stopped; start the same command again to resume", file=sys.stderr)
        return 130


def _meet(verb: str) -> None:
    """What is to be known of the launch. Raises ValueError where several processes were asked for and cannot do this."""
    if processes.one_of_several_meant():
        raise ValueError("accelerate launch has started one process, as it does without a GPU or mpirun: give it --multi_gpu, and no --cpu (on a "
                         "machine with GPUs with ACCELERATE_USE_CPU=true before it), which starts --num_processes of them")
    if not processes.several():
        return
    if verb not in SHARED:
        raise ValueError(f"{verb} runs in one process: start it without accelerate launch ({', '.join(SHARED)} share their work)")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what it was asked to do
    if not processes.main():  # answers and progress are the main process's
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if processes.state().device.type != "cpu":
        raise ValueError("models are trained on the processor: set ACCELERATE_USE_CPU=true before accelerate launch")


def _overview() -> str:
    lines = ["usage: distill VERB [flags]     (distill VERB --help lists them)", ""]
    lines += [f"  {name:10} {(verb.__doc__ or '').strip().splitlines()[0]}" for name, (verb, _) in VERBS.items()]
    return "\n".join(lines)


def _parse(verb: str, arguments: list[str]):
    import tyro

    kind, defaults = VERBS[verb][0], {}
    if verb in POSITIONAL and arguments and not arguments[0].startswith("-"):
        arguments = [POSITIONAL[verb], *arguments]
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise ValueError("--config stands last: give a YAML file after it")
        defaults = _read_config(kind, arguments[at + 1])
        del arguments[at : at + 2]
    if not defaults:
        ready = f" So does the name of a ready setting: {', '.join(sorted(_ready()))}." if issubclass(kind, config.Fit) else ""
        about = f"{(kind.__doc__ or '').strip()}  --config FILE.yaml sets defaults.{ready}"
        return tyro.cli(kind, args=arguments, prog=f"distill {verb}", description=about)
    from dataclasses import MISSING, fields

    needed = {f.name: tyro.MISSING for f in fields(kind) if f.default is MISSING and f.name not in defaults}
    return tyro.cli(kind, args=arguments, prog=f"distill {verb}", default=kind(**(defaults | needed)))


def _ready() -> dict[str, Path]:
    """The ready settings that ship with the package, by name."""
    return {file.stem: file for file in (Path(__file__).parent / "assets" / "settings").glob("*.yaml")}


def _read_config(kind: type, path: str) -> dict:
    import yaml

    try:
        values = yaml.safe_load((Path(path) if Path(path).is_file() else _ready().get(path, Path(path))).read_text()) or {}
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"--config {path}: no such file; give a YAML file of field names and values, or for prune and fit a ready setting "
                         f"({', '.join(sorted(_ready()))})") from None
    except yaml.YAMLError:
        raise ValueError(f"--config {path}: not valid YAML; correct it") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: give a mapping of field names to values")
    return config.from_mapping(kind, values, path)


def _refuse(sentence: str) -> int:
    which = "" if processes.main() else f" (process {processes.rank()})"
    print(f"distill{which}: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def program() -> NoReturn:
    """The command line as a program."""
    processes.end(main())


if __name__ == "__main__":
    program()
