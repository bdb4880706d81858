"""The training loop of the generators: seeded batches, progress, a checkpoint that a run goes on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.checkpoint import Checkpoint, recorded_run
from ..runtime.progress import track
from ..runtime.seeds import stream

logger: logging.Logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 200
TIMED = 3
"""Steps that are timed before a training, after one that warms up."""

LossTerms = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
"""(indices of a batch, randomness on the CPU) -> terms of the loss, already weighted, by name."""


def forecast(name: str, epochs: int, wanted: int, per_epoch: int, seconds: float, setting: str = "epochs") -> str:
    """How long a training takes in all, for people.

    Args:
        name: of the run.
        epochs, wanted: passes that will be made, and that the settings ask for.
        per_epoch: steps of a pass.
        seconds: for one step.
        setting: what sets the number of epochs.
    """
    wait = seconds * epochs * per_epoch
    amount = f"{wait / 3600:.1f} h" if wait >= 5400 else f"{wait / 60:.0f} min" if wait >= 90 else f"{wait:.0f} s"
    steps = f"{name}: {epochs * per_epoch} steps ({epochs} epochs) of {seconds:.2g} s, about {amount} in all; "
    if epochs < wanted:
        return steps + f"{wanted} epochs would exceed `minutes` (--minutes): a larger limit fits more closely"
    flag = " (--epochs)" if setting == "epochs" else ""  # the command fits ICM-LoRA alone
    return steps + f"`{setting}`{flag} makes it shorter"


def train(
    module: nn.Module,
    terms: LossTerms,
    count: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    name: str,
    limit: float | None = None,
    settle: float = 0.0,
    setting: str = "epochs",
    checkpoint: Path | None = None,
    run: dict[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """Minimise the sum of the terms by Adam, the learning rate falling to zero along a cosine.

    Args:
        module: trained in place, left in evaluation mode.
        terms: the loss of a batch.
        count: examples; each epoch draws them in a new order, its last batch filled up from the epoch's start.
        epochs, batch_size, lr, seed: of the training.
        name: of the run: progress bar and random streams.
        limit: seconds; of `epochs`, only as many are made as take so long by the first steps' time, at least one. A
            checkpoint keeps their number.
        settle: share of the steps, at the end, in which batch norm no longer counts and uses its running statistics.
        setting: name of the setting that `epochs` comes from, for messages.
        checkpoint: safetensors file written every 200 steps and at the end; where it exists, training goes on from
            it and ends with the same bits.
        run: JSON that a checkpoint must agree with.
        quiet: no progress bar.

    Returns:
        float32 [steps] of each term.

    Raises:
        ValueError: a checkpoint that is damaged or of another run.
        FloatingPointError: the loss became NaN or infinite.
    """
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    batch_size = min(batch_size, count)
    per_epoch = math.ceil(count / batch_size)
    module.train()
    seconds = _seconds_of_a_step(module, terms, batch_size, stream(seed, name, "timing"))
    wanted, epochs = epochs, _epochs_within(limit, epochs, seconds * per_epoch, checkpoint)
    logger.info("%s", forecast(name, epochs, wanted, per_epoch, seconds, setting))
    steps = epochs * per_epoch
    history: dict[str, Tensor] = {}
    saved = Checkpoint(
        checkpoint,
        {**(run or {}), "epochs": epochs},
        modules={"module": module},
        optimizer=optimizer,
        histories=history,
        steps=steps,
    )
    done = saved.resume()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]
    bar = track(range(done, steps), name, quiet=quiet, initial=done)
    for step in bar:
        if step >= (1 - settle) * steps:
            for norm in norms:
                norm.eval()
        epoch, batch = divmod(step, per_epoch)
        order = torch.randperm(count, generator=stream(seed, name, "order", epoch))
        index = order[torch.arange(batch * batch_size, (batch + 1) * batch_size) % count]
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        found = terms(index, stream(seed, name, "noise", step))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        for key, value in found.items():
            history.setdefault(key, torch.zeros(steps, device=value.device))[step] = value.detach()
        if step % 50 == 0 or step + 1 == steps:
            values = {key: value[step].item() for key, value in history.items()}
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(f"the loss of {name!r} became {values} at step {step}; lower `lr`.")
            bar.set_postfix({key: f"{value:.3g}" for key, value in values.items()}, refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            saved.write(step + 1)
    module.eval()
    return {key: value.cpu() for key, value in history.items()}


def _seconds_of_a_step(module: nn.Module, terms: LossTerms, batch_size: int, generator: torch.Generator) -> float:
    """Time of a whole step, by a few without effect: they learn at rate 0, and batch norm's statistics are put back."""
    before = [buffer.clone() for buffer in module.buffers()]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
    index = torch.arange(batch_size)
    for step in range(1 + TIMED):
        if step == 1:
            start = time.perf_counter()  # Windows' monotonic clock ticks every 16 ms
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack(list(terms(index, generator).values())).sum()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU
    for buffer, statistics in zip(module.buffers(), before, strict=True):
        buffer.copy_(statistics)
    module.zero_grad(set_to_none=True)
    return (time.perf_counter() - start) / TIMED


def _epochs_within(limit: float | None, epochs: int, seconds: float, checkpoint: Path | None) -> int:
    """Passes of `seconds` each that fit into the limit; those of the checkpoint where there is one."""
    if limit is None:
        return epochs
    if checkpoint is not None and type(begun := recorded_run(checkpoint).get("epochs")) is int and begun >= 1:
        return min(begun, epochs)
    return max(1, min(epochs, int(limit / seconds)))
