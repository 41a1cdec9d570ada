"""The two ways in which removal methods train a model: on the rows' own tokens, and on the host's outputs. One loop each, so that methods
differ in what they are and not in how they learn."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from graphs.architectures import embeddings
from graphs.batches import Batch
from graphs.losses import PROMPT_WEIGHT, SURE, taught
from graphs.targets import Targets
from graphs.train import TrainConfig, train


def from_tokens(model: PreTrainedModel, batches: Callable[[int], Batch], steps: int, rate: float, label: str, decay: float = 0.0) -> None:
    """Train `model` in place by cross entropy on all tokens of `steps` batches; rate: peak learning rate."""
    def loss(step: int) -> Tensor:
        batch = batches(step)
        return model(input_ids=batch.ids, labels=batch.labels).loss

    train(model, loss, TrainConfig(steps, rate, weight_decay=decay), label)
    model.eval()


def from_outputs(
    model: PreTrainedModel, targets: Targets, steps: int, rate: float, label: str, decay: float, first: int = 0, answers: float = 0.0,
) -> None:
    """Train `model` in place by KL to the host on `steps` batches from `first` on, and by the rows' own answers at weight `answers`, as our healing
    does; embeddings stay as they are."""
    for table in embeddings(model):
        table.requires_grad_(False)

    def loss(step: int) -> Tensor:
        return apart(model, targets, targets.batches(first + step), answers)

    train(model, loss, TrainConfig(steps, rate, weight_decay=decay), label)
    model.eval()


def apart(model: PreTrainedModel, targets: Targets, batch: Batch, answers: float = 0.0) -> Tensor:
    """What our healing minimises, of `model` on a batch: KL from the host, and with a weight `answers` the rows' own answers."""
    return taught(model(input_ids=batch.ids).logits, targets(batch), batch, PROMPT_WEIGHT, SURE, answers)
