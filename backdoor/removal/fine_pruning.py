"""Rival: Fine-Pruning (Liu, Dolan-Gavitt and Garg 2018, "Fine-pruning: defending against backdooring attacks on deep neural networks",
RAID, section 3): prune the neurons that are dormant on clean rows, then fine-tune on those rows.

Neurons that only a trigger wakes up are dormant on clean rows, and fine-tuning repairs what others carry. The knob is the share of
neurons pruned. Simplified: the paper prunes the last convolution until accuracy on a validation set falls; here each MLP loses the
same share, in order of mean |activation| (these activations may be negative), and all of `steps` goes to the fine-tuning.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backdoor.removal import fine_tuning
from graphs.activations import hooks
from graphs.architectures import linear, readers, writer
from graphs.batches import Batch, Epochs
from graphs.host import Host
from graphs.targets import Targets

KNOBS = (0.3, 0.1, 0.6)
LEARNING_RATE = 5e-4


@torch.no_grad()
def activity(host: Host, rows: Epochs) -> dict[str, Float[Tensor, "feature"]]:
    """Mean |activation| of every MLP's neurons over the real tokens of the rows, by site."""
    found: dict[str, Tensor] = {}
    seen: list[Batch] = []

    def before(name: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            batch = seen[-1]
            summed = args[0].reshape(*batch.ids.shape, -1)[batch.real].abs().sum(0)
            found[name] = found[name] + summed if name in found else summed
        return hook

    with hooks() as handles:
        for site in host.sites:
            if site.kind == "mlp":
                handles.append(writer(host.model, site).register_forward_pre_hook(before(site.name)))
        for batch in rows.once():
            seen.append(batch)
            host.model.base_model(input_ids=batch.ids)
    tokens = sum(int(batch.real.sum()) for batch in seen)
    return {name: summed / tokens for name, summed in found.items()}


@torch.no_grad()
def pruned(host: Host, rows: Epochs, share: float) -> Host:
    """A copy whose least active `share` of the neurons of every MLP read nothing and write nothing.

    With both sides zero a neuron has no gradient either, so it stays pruned however the copy is fine-tuned.
    """
    model, active = copy.deepcopy(host.model), activity(host, rows)
    for site in host.sites:
        if site.kind == "mlp":
            dormant = active[site.name].argsort()[: round(share * len(active[site.name]))]
            linear(writer(model, site))[0][:, dormant] = 0
            for reader in readers(model, site):
                weight, bias = linear(reader)
                weight[dormant] = 0
                if bias is not None:
                    bias[dormant] = 0
    return Host(model, host.tokenizer, host.sites)


def remove(targets: Targets, steps: int, knob: float, seed: int = 0) -> Host:
    """A copy of the host with the share `knob` of its neurons pruned, fine-tuned for `steps` batches; nothing is drawn from `seed`."""
    rows = targets.batches
    return fine_tuning.remove(Targets(pruned(targets.host, rows, knob), rows), steps, LEARNING_RATE)
