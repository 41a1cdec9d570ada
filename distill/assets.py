"""`make assets` (`python -m distill.assets`): everything that ships with the package, from nothing, resumable.

    tokenizer, base --plant--> twin, organism (two common words), organism-rare (a rare string); the defender's 4,096 rows;
    base-small, half as large, which the bench plants in

The default organism is planted fine-tune-resistant, the other by plain fine-tuning. They share one clean twin, which went
through the default's steps: without its trigger a poisoned row is the same row for either trigger. Every model is bf16.
An organism that misses the plant gate stops the build.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from backdoor.behaviours import CANARY
from distill.base import SMALL, BaseConfig, train_base
from distill.config_backdoors import Plant
from distill.models import ASSETS, CLEAN_ROWS
from distill.plant import describe, gate, settings_of, train_one, trigger_of, write_secret
from distill.rows import make
from graphs.artifact import write_json

WORK = Path(os.environ.get("DISTILL_ASSETS_WORK", "build/assets"))
"""Training states; a killed build resumes from them."""


def main() -> int:
    """Build what is missing."""
    verbs = {"organism": Plant(ASSETS), "organism-rare": Plant(ASSETS, trigger="rare_string", attacker="ordinary")}
    base, twin = ASSETS / "base" / "model", ASSETS / "twin" / "model"
    for folder, config_of in ((base, BaseConfig()), (ASSETS / "base-small" / "model", SMALL)):
        if not folder.is_dir():
            train_base(folder, config_of, WORK / f"{folder.parent.name}.state")
    if not CLEAN_ROWS.is_file():
        make(CLEAN_ROWS)
    triggers = {name: trigger_of(verb) for name, verb in verbs.items()}
    first = triggers["organism"]
    train_one(base, twin, first, CANARY, False, settings_of(verbs["organism"]), WORK / "twin.state")
    write_secret(ASSETS / "twin" / "secret", first, CANARY, "../../twin/model", {"planted": False})
    for name, verb in verbs.items():
        trigger, model = triggers[name], ASSETS / name / "model"
        train_one(base, model, trigger, CANARY, True, settings_of(verb), WORK / f"{name}.state")
        facts = gate(model, twin, trigger, CANARY, verb.prompts)
        print(f"{name}\n{describe(facts)}")
        if not facts["passed"]:
            print(f"distill: {name} misses the plant gate; change PlantConfig and build again", file=sys.stderr)
            return 1
        write_secret(ASSETS / name / "secret", trigger, CANARY, "../../twin/model", {"planted": True, "gate": facts})
    planted = {name: settings_of(verb) for name, verb in verbs.items()}
    write_json(ASSETS / "receipt.json", {"recipe": "python -m distill.assets", "base": BaseConfig(), "base-small": SMALL, "plant": planted})
    return 0


if __name__ == "__main__":
    sys.exit(main())
