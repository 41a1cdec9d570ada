"""The one training loop, on accelerate.

`loss(step)` is a pure function of the weights and the step, so the loop's whole state is (weights, AdamW moments,
step): it is saved as safetensors, never as a pickle, and a killed run resumes at its last save. bf16 autocast is used
where the machine multiplies bf16 natively; elsewhere it would be many times slower than float32. `accelerate launch --mixed_precision`, or its
variable ACCELERATE_MIXED_PRECISION, decides instead where it is there: numbers that two machines are to share want `no`.

Under `accelerate launch` every process runs the loop. What is minimised is the mean of the losses that they return (`graphs.shares` says how
a share of a batch is weighed), with DDP, or with FSDP2: weights, gradients and moments in shards, and the weights whole while a loss is
taken. The state that is saved holds whole tensors and no word of processes, so a run goes on with any number of them.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphs.processes import agreed, main, several
from graphs.processes import state as processes
from graphs.shares import averaged, full, like, make_whole, put

SAVE_EVERY = 50
"""Steps between saves of a run that asked for a state file."""
RELEASE_EVERY = 25
"""Steps between two releases of memory: without them it grows from step to step (LOG.md)."""


@dataclass(frozen=True)
class TrainConfig:
    """steps; learning_rate: peak; warmup and decay: shares of the steps; decay is linear or cosine to `floor` of the peak."""

    steps: int
    learning_rate: float
    warmup: float = 0.05
    decay: float = 0.95
    floor: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    shape: Literal["linear", "cosine"] = "linear"


def rate(config: TrainConfig, step: int) -> float:
    """The learning rate's multiple at `step`: warmup, constant, decay."""
    warm, start = config.warmup * config.steps, (1 - config.decay) * config.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    left = min(1.0, max(0.0, (config.steps - step) / max(1.0, config.steps - max(start, warm))))
    return config.floor + (1 - config.floor) * (left if config.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def native_bf16() -> bool:
    """Whether this machine multiplies bf16 natively (a GPU that does, or a CPU with AMX or AVX512-BF16)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def precision() -> str:
    """What training computes in, in accelerate's words: "bf16" or "no" (float32). Raises ValueError where another was asked for."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if native_bf16() else "no")
    if asked not in ("bf16", "no"):
        raise ValueError(f"ACCELERATE_MIXED_PRECISION={asked}: training is done in bf16 or in float32; set it to bf16 or to no")
    return asked


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of handing every large tensor back to the kernel.

    Each step frees and asks for the same blocks; without this a third of the processor time goes to page faults. Does
    nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    for option, size in ((mmap_threshold, 32 << 20), (trim_threshold, (1 << 31) - 1), (top_pad, 64 << 20)):
        mallopt(option, size)


def release_memory() -> None:
    """Hand what `keep_memory` has kept and nobody uses back to the kernel; batches of many shapes scatter it ever wider."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    config: TrainConfig,
    label: str,
    state: Path | None = None,
    save_every: int | None = None,
    after: Callable[[int], bool | None] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[float]:
    """Minimise `loss(step)` over the parameters of `module` that require gradients; returns the loss of every step.

    state: file that the run is saved to each `save_every` (by default SAVE_EVERY) steps and at the end, and resumed
        from; the caller discards it when what it was trained for is on disk.
    after: called after each step (schedules, projections, measurements); training ends where it returns True.
    rates: multiples of the learning rate by name prefix.
    """
    from accelerate import Accelerator

    keep_memory()
    accelerator = Accelerator(mixed_precision=precision(), **(_of_several() if several() else {}))
    parameters = _trained(module)
    optimizer = torch.optim.AdamW(_groups(parameters, config, rates or {}), lr=config.learning_rate, betas=config.betas, fused=True)
    if several():
        loss, prepared = accelerator.prepare(_Loss(module, loss), optimizer)
        parameters = _trained(module)  # FSDP2 has put shards in their place
    else:
        prepared = accelerator.prepare(optimizer)
    start, losses = _resume(state, parameters, optimizer)
    bar = tqdm(range(start, config.steps), desc=label, initial=start, total=config.steps, mininterval=1.0, leave=False)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * group["multiple"] * rate(config, step)
        with accelerator.autocast():
            value = loss(step)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(list(parameters.values()), config.clip)
        prepared.step()
        prepared.zero_grad()
        losses.append(float(averaged(value)))
        ended = after is not None and after(step)
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
        if (step + 1) % RELEASE_EVERY == 0 or step + 1 == config.steps:
            release_memory()
        if state and ((step + 1) % (save_every or SAVE_EVERY) == 0 or step + 1 == config.steps):
            _save(state, parameters, optimizer, step + 1, losses)
        if ended:
            break
    bar.close()
    make_whole(module)
    return losses


class _Loss(nn.Module):
    """A loss as the forward pass of what is trained: what DDP and FSDP2 wrap."""

    def __init__(self, module: nn.Module, loss: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, step: int) -> Tensor:
        return self.loss(step)


def _of_several() -> dict[str, Any]:
    """What accelerate is told where there are several processes. FSDP2 shards the loss as one unit: parts of a model are called by themselves."""
    from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, parse_flag_from_env

    where = processes()
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
        return {"cpu": where.device.type == "cpu", "fsdp_plugin": plugin}
    together = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return {"cpu": where.device.type == "cpu", "kwargs_handlers": [together]}


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def discard(state: Path) -> None:
    """Remove the training states `state` and `state`.* (the steps of one job), once the artifact they were for is whole."""
    for file in (state, *state.parent.glob(f"{state.stem}.*")):
        if main() and file.is_file():
            file.unlink()


def _groups(parameters: dict[str, nn.Parameter], config: TrainConfig, rates: Mapping[str, float]) -> list[dict]:
    """Parameter groups by (is a matrix, multiple of the rate): only matrices decay."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        multiple = next((value for prefix, value in rates.items() if name.startswith(prefix)), 1.0)
        groups.setdefault((parameter.ndim > 1, multiple), []).append(parameter)
    return [{"params": found, "weight_decay": config.weight_decay * matrix, "multiple": multiple} for (matrix, multiple), found in groups.items()]


def _save(state: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, losses: list[float]) -> None:
    from safetensors.torch import save_file

    tensors = {"losses": torch.tensor(losses, dtype=torch.float64), "step": torch.tensor(step)}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = full(parameter.detach()).contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = full(torch.as_tensor(value)).contiguous()
    if not main():
        return
    temporary = state.with_name(f".{state.name}.tmp")
    state.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary)
    os.replace(temporary, state)


def _resume(state: Path | None, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    if state is None or not agreed(state.exists):
        return 0, []
    from safetensors.torch import load_file

    saved = load_file(state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            put(parameter, saved[f"weight.{name}"])
            moments = {key: like(saved[f"{key}.{name}"], parameter) for key in ("exp_avg", "exp_avg_sq") if f"{key}.{name}" in saved}
            if moments:
                optimizer.state[parameter] = {"step": saved[f"step.{name}"].to(parameter.device), **moments}
    return int(saved["step"]), saved["losses"].tolist()
