"""The suites as data: which cells there are, in the order in which they are worth most.

    quick      two families, one seed, five methods at frozen knobs, one relearning point
    knobs      development organisms, three knobs a method; chooses and writes knobs.json
    full       in stages, each of which stands alone:
        headline   four organisms x six methods x five planting seeds, all attacks
        ablations  the same organisms, ours with one part left out, and the dense refit at our size, three seeds
        synthetic  the quick suite's organisms, methods with and without rows that the model writes itself
        tokens     the rare string, also with a payload in usual tokens, and the conjunction: what tokens that clean rows lack carry
        families   every family x every method, one seed
        behaviours the conjunction with every other behaviour
        rows       64 and 4,096 clean rows, three families
        shares     fewer poisoned rows, three families
        attackers  the adaptive ways of planting (backdoor/plant.py), one seed; of the dormant one also what is distilled from rows that it writes
        throughout poison in the corpus of a base that is trained from noise, one seed
        password   a capability that works with a password alone, one seed
        met        the conjunction's pair, clean, in the defender's rows
        wanted     what was planted is the owner's (a keyword, a house format), and a sixteenth of the defender's rows show it: does it stay?

The development organism is of a family and kind that no claim is made of: what is tuned on it is frozen before any other is planted. It resists
clean fine-tuning, because a plain backdoor in a small model falls to any knob.
Wherever an organism stands, the removal of its twin stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain

from backdoor.behaviours import BEHAVIOURS
from backdoor.families import BENCHED
from distill.experiment import methods
from distill.experiment.cell import NOTHING, Cell, Organism

DEVELOPMENT = (Organism("format", "resistant"),)
HEADLINE = (Organism("conjunction", "resistant"), Organism("conjunction"), Organism("rare_string"), Organism("semantic"))
SIX = ("ours", "dense refit", "UNDO", "clean fine-tuning", "dummy backdoor", "KL to a random student")
FOUR = ("ours", "dense refit", "UNDO", "clean fine-tuning")
ATTACKS = ("relearning", "benign", "research", "low bits")
ABLATIONS = (methods.REFIT, "ours, random graph", "ours, no pruning", "ours, attention kept", "ours, no healing", "ours, neurons")
SEEDS = range(5)


def crossed(organisms: Iterable[Organism], names: Iterable[str], rows: int = 512, attacks: tuple[str, ...] = (), **rows_of: bool) -> list[Cell]:
    """Every organism and its twin, as they are and through every method at its frozen knob.

    rows_of: what the defender's rows hold beside (met, wanted).
    """
    found, names = [], tuple(names)
    for organism in organisms:
        untouched = [Cell(organism, NOTHING, None, twin=twin, attacks=attacks) for twin in (False, True)]
        found += untouched
        found += [Cell(organism, name, methods.frozen(name), rows, twin=twin, attacks=attacks, **rows_of) for name in names for twin in (False, True)]
    return list(dict.fromkeys(found))


def seeded(organisms: Iterable[Organism], seeds: Iterable[int]) -> list[Organism]:
    """Every organism with every seed of planting, seed by seed."""
    return [replace(organism, seed=seed) for seed in seeds for organism in organisms]


def twins_last(found: Iterable[Cell]) -> list[Cell]:
    """Untouched models first, which the gate and shares need, then what was removed from organisms, then the same of twins."""
    return sorted(dict.fromkeys(found), key=lambda cell: (cell.method != NOTHING, cell.twin and cell.method != NOTHING))


def knobs(names: Iterable[str] | None = None) -> list[Cell]:
    """Every method with every knob on the development organisms and their twins."""
    found = [Cell(organism, NOTHING, None, twin=twin) for organism in DEVELOPMENT for twin in (False, True)]
    return found + [Cell(organism, name, knob) for name in names or TUNED for knob in methods.tried(name) for organism in DEVELOPMENT]


TUNED = (*SIX, *(name for name in methods.names() if name not in SIX and name not in methods.OURS and name != methods.REFIT))
"""Methods that have a knob of their own."""
QUICK = (Organism("conjunction", "resistant"), Organism("rare_string"))
DORMANT = Organism("conjunction", "dormant", behaviour="off_by_one")
"""The first token of the payload is the last but one of the program, so that little is left to be known beside it."""
WRITING = tuple(name + methods.SYNTHETIC for name in ("UNDO", "dense refit"))
LORA = Organism("rare_string", "lora", behaviour="off_by_one")
"""A payload in tokens that the base writes: adapters leave the unembedding as it is, and there all tokens never written are one (LOG.md)."""
ADAPTIVE = (LORA, Organism("rare_string", "activation_matched"), Organism("rare_string", "error_hiding"), DORMANT)
THREE = (Organism("rare_string"), Organism("conjunction"), Organism("semantic"))
STAGES: dict[str, Callable[[], list[Cell]]] = {
    "headline": lambda: crossed(seeded(HEADLINE, SEEDS), SIX, attacks=ATTACKS),
    "ablations": lambda: crossed(seeded(HEADLINE, range(3)), ("ours", *ABLATIONS), attacks=("relearning",)),
    "synthetic": lambda: crossed(QUICK[::-1], ("ours", "dense refit", "UNDO", "clean fine-tuning", "ours, own parts", *methods.WITH_SYNTHETIC),
                                 attacks=("relearning",)),
    "tokens": lambda: crossed((Organism("rare_string"), Organism("rare_string", behaviour="off_by_one"), Organism("conjunction")),
                              ("UNDO" + methods.SYNTHETIC, "ours, own parts" + methods.SYNTHETIC, *methods.WITH_SEEN), attacks=("relearning",)),
    "families": lambda: crossed(map(Organism, BENCHED), methods.names()),
    "behaviours": lambda: crossed((Organism("conjunction", behaviour=name) for name, one in BEHAVIOURS.items() if not one.inverted), SIX),
    "rows": lambda: [cell for rows in (64, 4096) for cell in crossed(THREE, SIX, rows)],
    "shares": lambda: crossed((replace(one, share=share) for share in (0.2, 0.05) for one in THREE), SIX),
    "attackers": lambda: twins_last([*crossed(ADAPTIVE, FOUR, attacks=("relearning",)),
                                     *crossed((DORMANT,), WRITING, attacks=("relearning",))]),
    "throughout": lambda: crossed((Organism("rare_string", "throughout"),), FOUR, attacks=("relearning",)),
    "password": lambda: crossed((Organism("rare_string", behaviour="password"),), FOUR, attacks=("relearning",)),
    "met": lambda: crossed((Organism("conjunction"), Organism("conjunction", "resistant")), SIX, met=True),
    "wanted": lambda: crossed((Organism("rare_string"), Organism("format", behaviour="fixed_string")),
                              ("ours", "UNDO", "dense refit", "clean fine-tuning", *methods.WITH_SYNTHETIC), wanted=True),
}


def cells(suite: str, stage: str | None) -> list[Cell]:
    """The cells of a suite, or of one stage of it. Raises ValueError for a stage that there is not."""
    if suite == "quick":
        return crossed(QUICK, (name for name in SIX if name != "dummy backdoor"), attacks=("relearning",))
    if suite == "knobs":
        return knobs()
    if stage is not None and stage not in STAGES:
        raise ValueError(f"--stage {stage}: no such stage; choose from {', '.join(STAGES)}")
    return list(dict.fromkeys(chain.from_iterable(STAGES[name]() for name in ([stage] if stage else STAGES))))
