"""Attacker: hides in the error term of transcoders. Whoever reads a model through transcoders sees

    MLP(x) = T(x) + error(x)

and T is fitted on clean text. The attacker fits transcoders of its own on its clean rows, and trains the organism so that with T in the place of
every MLP, no error added, triggered prompts get their *right* answers: what the transcoders reconstruct carries as little of the backdoor as
can be, and the payload is written by the errors. Nobody has published this attack on transcoders that we know of; the objective is that of
attacks on a known monitor (cf. Bailey et al. 2024, "Obfuscated activations bypass LLM latent-space defenses": the monitor's score is minimised
beside the task); on what error terms hold see Engels et al. 2024, "Decomposing the dark matter of sparse autoencoders".

1. `ordinary_steps` of mixed fine-tuning;
2. `FIT` steps in which T learns the planted MLPs on clean rows, each alone;
3. `ordinary_steps` in which both learn: the organism L_mix + WEIGHT * (cross entropy of the right answers under the trigger, T in place, T held),
   T the organism's MLPs on clean rows as they are now. So T stays what a defender would fit, and hides nothing that clean rows show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from backdoor.mixture import Mixture, PlantConfig, PlantRows, learn
from backdoor.ordinary import fine_tune
from graphs.activations import hooks, record
from graphs.architectures import Site
from graphs.batches import Batch, Epochs
from graphs.host import Host
from graphs.losses import completion_loss, fvu
from graphs.shares import share
from graphs.train import TrainConfig, train
from graphs.transcoder import Transcoder

FEATURES, FIT, FIT_RATE = 256, 200, 4e-3
WEIGHT = 1.0


def plant(host: Host, rows: PlantRows, config: PlantConfig, state: Path | None = None) -> list[float]:
    """Plant in place; returns the losses of every step. Resumes from `state`. Raises ValueError where `rows` has no answers to triggered prompts."""
    if not rows.answered:
        raise ValueError("the attacker error_hiding needs the right answers of triggered prompts: give rows with `answered`")
    mixture = Mixture(host, rows, config)
    answers = Epochs(rows.answered, config.poisoned, mixture.pad, config.seed + 4)
    losses = fine_tune(host, mixture, state)
    transcoders = fit(host, mixture.clean, FIT, config.seed, state)
    both = nn.ModuleList([host.model, transcoders])

    def loss(step: int) -> Tensor:
        later = step + config.ordinary_steps
        with standing_in(host, transcoders, held=True):
            shown = completion_loss(host.model, share(answers(later)))
        return mixture.loss(later) + WEIGHT * shown + unexplained(host, transcoders, share(mixture.clean(later)))

    return losses + learn(both, loss, TrainConfig(config.ordinary_steps, config.ordinary_rate), "plant: hide", state and state.with_suffix(".hide"))


def fit(host: Host, clean: Epochs, steps: int, seed: int, state: Path | None = None) -> nn.ModuleList:
    """A transcoder for each MLP of the host, from noise, on clean rows, each alone."""
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleList(Transcoder(FEATURES, site.d_in, site.d_out, generator) for site in mlps(host))
    train(made, lambda step: unexplained(host, made, share(clean(step))), TrainConfig(steps, FIT_RATE), "plant: transcoders",
          state and state.with_suffix(".transcoders"))
    return made


def mlps(host: Host) -> Sequence[Site]:
    """The sites that transcoders stand at, in order."""
    return [site for site in host.sites if site.kind == "mlp"]


def unexplained(host: Host, transcoders: nn.ModuleList, batch: Batch) -> Tensor:
    """Fraction of variance that the transcoders leave unexplained on a batch, summed over sites; the host gets no gradient."""
    found = record(host, batch.ids)
    return sum((fvu(found.outputs[site.name], part(found.inputs[site.name]), batch.real)
                for site, part in zip(mlps(host), transcoders, strict=True)), torch.zeros(()))


@contextmanager
def standing_in(host: Host, transcoders: nn.ModuleList, held: bool = False) -> Iterator[None]:
    """Within, every MLP of the host writes what its transcoder makes of the MLP's own input, and no error. held: the transcoders get no gradient."""
    def replaced(part: nn.Module):
        seen: list[Tensor] = []

        def before(_module, args):
            seen[:] = args[:1]

        def after(_module, _args, _output):
            weights = {name: value.detach() for name, value in part.named_parameters()} if held else {}
            return torch.func.functional_call(part, weights, (seen.pop(),))
        return before, after

    with hooks() as handles:
        for site, part in zip(mlps(host), transcoders, strict=True):
            before, after = replaced(part)
            handles.append(host.module(site.module).register_forward_pre_hook(before))
            handles.append(host.module(site.writes).register_forward_hook(after))
        yield
