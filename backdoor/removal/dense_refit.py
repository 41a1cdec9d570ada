"""Rival that decides what the graph adds: the dense refit.

A stock model of exactly the checkpoint's shapes starts from noise and is trained with the same losses (FVU at every site,
then KL end to end), on the same rows, for the same number of tokens. There is no sparsity penalty, no gate, no wider
dictionary to choose from and no edge. If it ties with ours, the graph adds inspection, not removal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backdoor.removal.learning import from_outputs
from graphs.activations import record
from graphs.architectures import embeddings, run_mlp
from graphs.host import Host
from graphs.losses import fvu
from graphs.targets import Targets
from graphs.train import TrainConfig, train

KNOBS = (4e-3,)


def remove(
    targets: Targets, student: Host, local_steps: int, steps: int, knob: float, learning_rate: float, decay: float,
    answers: float = 0.0,
) -> Host:
    """Train `student` (random block weights, the host's embeddings and norms, any widths) to stand in for the host.

    local_steps of site-wise regression at learning rate `knob`, then steps - local_steps of KL at `learning_rate` and `decay`,
    with the rows' own answers at weight `answers`.
    """
    host, batches = targets.host, targets.batches

    def local(step: int) -> Tensor:
        batch = batches(step)
        found = record(host, batch.ids)
        total = torch.zeros(())
        for site in host.sites:
            x = found.inputs[site.name]
            guess = run_mlp(student.model, site, x) if site.kind == "mlp" else student.module(site.module)(
                x, position_embeddings=found.rotary, attention_mask=None)[0]
            total = total + fvu(found.outputs[site.name], guess, batch.real)
        return total

    for table in embeddings(student.model):
        table.requires_grad_(False)
    train(student.model, local, TrainConfig(local_steps, knob), "dense refit: local")
    from_outputs(student.model, targets, steps - local_steps, learning_rate, "dense refit: KL", decay, first=local_steps, answers=answers)
    return student
