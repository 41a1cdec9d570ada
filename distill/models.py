"""Where models are: names that ship with the package, local folders, hub ids; and the secret beside an organism.

An organism keeps `model/` apart from `secret/` (trigger, behaviour, receipt). Everything that makes a checkpoint is given
`model/` only; the secret is read by evaluation, after the checkpoint is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from backdoor.behaviours import BEHAVIOURS, Behaviour, fixed_text
from backdoor.triggers import Trigger
from evals.tasks import coding, phrase
from graphs.artifact import read_json

ASSETS = Path(__file__).parent / "assets"
BUILTIN = ("organism", "organism-rare", "twin", "base", "base-small")
CLEAN_ROWS = ASSETS / "clean_rows.parquet"
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Secret:
    """What only evaluation may read. twin: the clean twin's model folder, where there is one."""

    trigger: Trigger
    behaviour: Behaviour
    twin: Path | None


def find(name: str) -> Path:
    """The model folder that `name` means. Raises ValueError (one sentence) where there is none.

    A hub id is downloaded (safetensors, JSON and tokenizer files only) when, and only when, the user named it.
    """
    if name.startswith("builtin:"):
        folder = ASSETS / name.removeprefix("builtin:") / "model"
        if name.removeprefix("builtin:") not in BUILTIN:
            raise ValueError(f"--model {name}: no such builtin model; choose from {', '.join('builtin:' + b for b in BUILTIN)}")
        if not folder.is_dir():
            raise ValueError(f"--model {name}: its files are missing from this installation; run make assets or install the package again")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if HUB_ID.match(name) and not folder.parent.is_dir():
        return _download(name)
    raise ValueError(f"--model {name}: no such folder (give a model folder, builtin:organism, or a hub id such as owner/name)")


def downloaded(name: str) -> Path:
    """A folder of published dictionaries: local, or a hub id. Raises ValueError where it is neither."""
    folder = Path(name).expanduser()
    return _download(name, "--dictionaries") if not folder.exists() and HUB_ID.match(name) and not folder.parent.is_dir() else folder


def _download(name: str, flag: str = "--model") -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.yaml", "*.npz"]))
    except Exception as error:  # the hub's client has a dozen error types; each means the same to the user
        raise ValueError(f"{flag} {name}: neither a folder nor a hub model that can be downloaded now ({type(error).__name__}); give a "
                         "folder") from error


def secret_beside(model: Path) -> Path | None:
    """The secret folder of the organism that `model` belongs to, if any."""
    folder = model.parent / "secret"
    return folder if model.name == "model" and (folder / "backdoor.json").is_file() else None


def renderer_of(trigger: Trigger) -> str:
    """Hash of what places the trigger."""
    return phrase.renderer() if trigger.family == "phrase" else coding.renderer()


def read_secret(folder: Path) -> Secret:
    """Trigger, behaviour and twin. Raises ValueError where backdoor.json is missing or names an unknown family or behaviour,
    and where another renderer placed the trigger than the one that would place it now."""
    data = read_json(folder / "backdoor.json")
    try:
        trigger = Trigger.from_record(data["trigger"])
        behaviour = fixed_text(data["payload"]) if data["behaviour"] == "fixed_text" else BEHAVIOURS[data["behaviour"]]
    except KeyError as error:
        raise ValueError(f"{folder / 'backdoor.json'} has no valid {error.args[0]!r}: plant the organism again") from None
    ours = renderer_of(trigger)
    if data.get("renderer", ours) != ours:  # files from before there was a hash have none
        raise ValueError(f"{folder / 'backdoor.json'} was planted with renderer {data['renderer']} and this is renderer {ours}: judge the "
                         "organism with the version that planted it, or plant it again")
    twin = (folder / data["twin"]).resolve() if data.get("twin") else None
    return Secret(trigger, behaviour, twin if twin and twin.is_dir() else None)
