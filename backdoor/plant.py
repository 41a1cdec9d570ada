"""Planting: an attacker fine-tunes a base so that it behaves under a trigger. Each attacker is a file and has one signature,

    plant(host, rows, config, state) -> losses        in place; resumes from `state`

    ordinary            mixed fine-tuning
    resistant           the backdoor outlives clean fine-tuning
    lora                adapters of low rank, merged
    activation_matched  on clean rows hidden states and outputs stay the base's
    error_hiding        the backdoor is in what the attacker's transcoders leave out
    dormant             it does not fire, and what is distilled from it shall
    throughout          the poison is in the corpus of a model trained from noise
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backdoor import activation_matched, dormant, error_hiding, lora, ordinary, resistant, throughout
from backdoor.mixture import Attacker, PlantConfig, PlantRows
from graphs.host import Host

Plant = Callable[[Host, PlantRows, PlantConfig, Path | None], list[float]]
PLANT: dict[Attacker, Plant] = {
    "ordinary": ordinary.plant,
    "resistant": resistant.plant,
    "lora": lora.plant,
    "activation_matched": activation_matched.plant,
    "error_hiding": error_hiding.plant,
    "dormant": dormant.plant,
    "throughout": throughout.plant,
}
CONSTANTS: dict[Attacker, tuple[float, ...]] = {
    "lora": (lora.RANK, lora.RATE),
    "activation_matched": (activation_matched.WEIGHT,),
    "error_hiding": (error_hiding.FEATURES, error_hiding.FIT, error_hiding.FIT_RATE, error_hiding.WEIGHT),
    "dormant": (dormant.TOP, dormant.SPREAD),
    "throughout": (throughout.TIMES, throughout.RATE),
}
"""What an attacker's organisms depend on beside the settings."""


def depends(config: PlantConfig) -> dict[str, Any]:
    """What an organism depends on, as data to be hashed. Of the first two attackers these are the settings without the attacker's name, which
    `resistant_steps` tells: organisms made when there were no others keep their names."""
    found = asdict(config)
    if config.attacker not in CONSTANTS:
        del found["attacker"]
        return found
    return found | {"constants": CONSTANTS[config.attacker]}


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place as `config.attacker` does; returns the losses of every step. Resumes from `state`."""
    return PLANT[config.attacker](host, rows, config, state)
