"""Quantisation: the cleaned model re-tested in fewer bits, as it may be run.

What removal changed by little can be rounded away again: unlearned knowledge comes back in 8 and 4 bits (Zhang et al. 2024,
"Catastrophic failure of LLM unlearning via quantization"), and a backdoor can be planted to show in int8 only (Hong et al.
2021, "Qu-ANTI-zation"). Copies are made in plain torch:

    int8    every linear weight to the nearest of 255 levels, symmetric, one scale for each output channel:
                scale = max |w| / 127,   w <- scale * round(w / scale)
            the embeddings at both ends, norms and biases stay as they are, and arithmetic too (what is tested is the rounding)
    bf16    all weights in bfloat16, and all arithmetic
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from backdoor.behaviours import Behaviour
from backdoor.triggers import Trigger
from evals.rates import UnderTrigger, check_kind, prompts, under_trigger
from evals.sandbox import Sandbox
from evals.tasks import Task
from graphs.architectures import embeddings, linear
from graphs.host import Host

Format = Literal["int8", "bf16"]
LEVELS = 127


@dataclass(frozen=True)
class QuantiseConfig:
    """formats to test; prompts: held-out triggered prompts; seed: of the prompts."""

    formats: tuple[Format, ...] = ("int8", "bf16")
    prompts: int = 100
    seed: int = 7


@dataclass(frozen=True)
class Quantised:
    """before: the model as it is; after: by format."""

    before: UnderTrigger
    after: dict[Format, UnderTrigger]


def retest(
    host: Host, task: Task, trigger: Trigger, behaviour: Behaviour, sandbox: Sandbox, config: QuantiseConfig | None = None
) -> Quantised:
    """Judge `host` and quantised copies of it on the same rows. Raises ValueError as `check_kind` and `prompts` do."""
    config = config or QuantiseConfig()
    check_kind(trigger, behaviour)
    rows = prompts(task, trigger, config.prompts, config.seed).triggered
    after = {kind: under_trigger(quantised(host, kind), task, behaviour, rows, sandbox) for kind in config.formats}
    return Quantised(under_trigger(host, task, behaviour, rows, sandbox), after)


def quantised(host: Host, kind: Format) -> Host:
    """A copy in the format `kind`; the host is left as it is."""
    model = copy.deepcopy(host.model)
    match kind:
        case "bf16":
            model.to(torch.bfloat16)  # type: ignore[arg-type]
        case "int8":
            apart = {id(table) for table in embeddings(model)}
            for module in model.modules():
                if isinstance(module, nn.Linear | Conv1D) and id(module) not in apart:
                    weight, _ = linear(module)
                    weight.copy_(rounded(weight))
    return Host(model, host.tokenizer, host.sites)


def rounded(weight: Float[Tensor, "out inside"]) -> Float[Tensor, "out inside"]:
    """Each row to the nearest of its 255 levels (a row of zeros stays one)."""
    scale = weight.abs().amax(1, keepdim=True) / LEVELS
    return torch.where(scale > 0, scale * (weight / scale).round(), weight)
