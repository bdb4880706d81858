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

from ..runtime.checkpoint import Checkpoint
from ..runtime.progress import track
from ..runtime.seeds import stream

logger: logging.Logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 200
TIMED = 3
"""Steps after the first that are timed, to say how long all will take."""

LossTerms = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
"""(indices of a batch, randomness on the CPU) -> terms of the loss, already weighted, by name."""


def forecast(name: str, steps: int, epochs: int, seconds: float, left: int, setting: str = "epochs") -> str:
    """How long a training will take, for people.

    Args:
        name: of the run.
        steps, epochs: in all.
        seconds: for one step.
        left: steps that are left.
        setting: what sets the number of epochs.
    """
    wait = seconds * left
    amount = f"{wait / 3600:.1f} h" if wait >= 5400 else f"{wait / 60:.0f} min" if wait >= 90 else f"{wait:.0f} s"
    flag = " (--epochs)" if setting == "epochs" else ""  # the command fits ICM-LoRA alone
    return (
        f"{name}: {steps} steps ({epochs} epochs) of {seconds:.2g} s, about {amount} from now; `{setting}`{flag} "
        "makes it shorter"
    )


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
    steps = epochs * per_epoch
    history: dict[str, Tensor] = {}
    saved = Checkpoint(
        checkpoint, run or {}, modules={"module": module}, optimizer=optimizer, histories=history, steps=steps
    )
    done = saved.resume()
    module.train()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]
    bar = track(range(done, steps), name, quiet=quiet, initial=done)
    start = time.monotonic()
    for step in bar:
        if step == done + 1:  # the first step warms up
            start = time.monotonic()
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
        if step == done + TIMED:
            next(iter(found.values())).item()  # waits for a GPU
            seconds = (time.monotonic() - start) / TIMED
            logger.info("%s", forecast(name, steps, epochs, seconds, steps - step - 1, setting))
        if step % 50 == 0 or step + 1 == steps:
            values = {key: value[step].item() for key, value in history.items()}
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(f"the loss of {name!r} became {values} at step {step}; lower `lr`.")
            bar.set_postfix({key: f"{value:.3g}" for key, value in values.items()}, refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            saved.write(step + 1)
    module.eval()
    return {key: value.cpu() for key, value in history.items()}
