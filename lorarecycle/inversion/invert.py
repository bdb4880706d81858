"""LoRA Inversion: labelled images synthesised from one adapter (LoRA Recycle, Sec. 4.1, 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Head
from ..config import InversionConfig, as_config, as_plain
from ..data.images import enlarge
from ..runtime.progress import Progress, track
from ..runtime.seeds import stream
from ..runtime.steps import Compile, compiled
from ..vit.backbone import Backbone
from .answers import teacher_answers
from .objective import inversion_loss
from .prior import BatchNormPrior
from .start import start_images, to_pixels
from .surrogate import Surrogate


def invert(
    backbone: Backbone,
    adapter: Adapter,
    *,
    config: InversionConfig | Mapping[str, Any] | None = None,
    prior: BatchNormPrior | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    teacher_logits: bool = True,
    scores: bool = True,
    compile: Compile = None,
    title: str | None = None,
    quiet: bool = False,
) -> Surrogate:
    """Synthesise labelled images that an adapter and its head recognise (Eq. 1, 2).

    Args:
        backbone: the model that the adapter was tuned on; its device is used.
        adapter: with a head.
        config: settings, or a mapping of those that differ; `InversionConfig()` when None.
        prior: naturalness prior; `config.prior` is loaded when None (nothing where that is None too).
        seed: of the noise and the augmentation.
        dtype: precision of the teacher, into which it is cast once the adapter is merged; the backbone's when None.
        teacher_logits: whether the teacher's logits of the finished images are wanted: what meta-training within an
            adapter's classes follows (Eq. 3).
        scores: whether the scores of their patches are wanted: what masks to any sparsity.
        compile: whether the step runs through `torch.compile`; on a GPU only when None. A mode of `torch.compile`
            works too.
        title: of the progress bar; with the adapter's name when None.
        quiet: show no progress bar.

    Returns:
        A `Surrogate` on the CPU, `config.images_per_class` images for every class of the head.

    Raises:
        ValueError: no head, an adapter that does not fit, or settings that do not fit the backbone.
        FloatingPointError: the loss of a batch was never finite.
    """
    config = as_config(InversionConfig, config)
    head = check_invertible(backbone, adapter, config).to(backbone.device)
    prior = load_prior(backbone, config, dtype) if prior is None else prior
    teacher = backbone.merge(adapter).to(dtype=dtype)
    loss_of = compiled(inversion_loss, compile, backbone.device)
    labels = torch.arange(len(head.class_names)).repeat(config.images_per_class)
    batches = labels.split(config.batch_size)
    images = []
    with track(range(len(batches) * config.steps), title or f"invert {adapter.name}", quiet=quiet) as bar:
        for i, wanted in enumerate(batches):
            generator = stream(seed, "inversion", i)
            start = start_images(teacher, head, wanted.to(backbone.device), config, generator)
            batch = _Batch(start, wanted.to(backbone.device), *_augmentation(config, start.shape[-1], generator))
            try:
                images.append(_optimise(teacher, head, batch, config, prior, loss_of, bar))
            except FloatingPointError as error:
                raise FloatingPointError(f"adapter {adapter.name!r}: {error}") from None
    pixels = torch.cat(images)
    answers = teacher_answers(
        teacher,
        pixels,
        head=head if teacher_logits else None,
        scores=scores,
        prune=config.prune,
        size=config.image_size,
        batch_size=config.batch_size,
    )
    return Surrogate(
        images=pixels,
        labels=labels,
        class_names=head.class_names,
        patch_size=teacher.patch_size,
        adapter=adapter.name,
        adapter_digest=adapter.weights_digest(),
        config=as_plain(config),
        **answers._asdict(),
    )


def check_invertible(backbone: Backbone, adapter: Adapter, config: InversionConfig) -> Head:
    """The adapter's head, after checking that inversion can work.

    Raises:
        ValueError: no head, an adapter that does not fit, a size or a pruning that does not fit the backbone.
    """
    if adapter.head is None:
        raise ValueError(
            f"adapter {adapter.name!r} must have a classification head to be inverted, got none; load it with "
            "`Adapter.load(path, head=...)` or put a head.safetensors (weight [C, D], bias [C]) beside it."
        )
    backbone.check(adapter)
    n = backbone.num_patches(config.image_size or backbone.image_size)
    backbone.kept_per_layer(config.prune, n)
    return adapter.head


def load_prior(backbone: Backbone, config: InversionConfig, dtype: torch.dtype | None = None) -> BatchNormPrior | None:
    """The prior that the settings name, on the backbone's device; None where they name none."""
    if config.prior is None or config.prior_weight == 0 or config.steps == 0:
        return None
    return BatchNormPrior.load(config.prior, size=config.prior_size, dtype=dtype).to(backbone.device)


class _Batch(NamedTuple):
    """Everything drawn for one batch."""

    start: Tensor
    """float32 [B, 3, s, s], normalised."""
    labels: Tensor
    """int64 [B]."""
    shifts: list[tuple[int, int]]
    """Roll of each step, rows and columns."""
    flips: list[bool]
    """Whether each step sees mirror images."""


def _optimise(
    teacher: Backbone,
    head: Head,
    batch: _Batch,
    config: InversionConfig,
    prior: BatchNormPrior | None,
    loss_of: Callable[..., Tensor],
    bar: Progress[int],
) -> Tensor:
    """Images uint8 [B, 3, H, W] of the step with the lowest loss."""
    size, device = config.image_size or teacher.image_size, teacher.device
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    low, high = -mean / std, (1 - mean) / std
    x = batch.start.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=config.lr, betas=config.betas)
    best, best_loss = x.detach().clone(), torch.tensor(torch.inf, device=device)
    prune_from = round(config.prune_from * config.steps) if config.prune else 0
    settled = best_loss
    for step in range(config.steps):
        seen = x.roll(batch.shifts[step], dims=(2, 3))
        seen = seen.flip(-1) if batch.flips[step] else seen
        prune = config.prune if step >= prune_from else None
        loss = loss_of(teacher, head, seen, batch.labels, prune, prior, config.prior_weight, size)
        optimizer.param_groups[0]["lr"] = step_size(step, config)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            better = loss < best_loss  # stays on the device: no synchronisation at every step
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, x, best)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(low, high)
        bar.update(1)
        if config.patience is not None and step >= prune_from and (step + 1) % config.patience == 0:
            if not best_loss <= 0.99 * settled:
                bar.update(config.steps - step - 1)
                break
            settled = best_loss
    if config.steps and not best_loss.isfinite():
        raise FloatingPointError(f"the loss was never finite in {config.steps} steps; lower `lr`.")
    return to_pixels(enlarge(best, size).clamp(low, high) * std + mean, size).cpu()


def step_size(step: int, config: InversionConfig) -> float:
    """Learning rate of a step: constant, or falling to zero along half a cosine."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2


def _augmentation(
    config: InversionConfig, size: int, generator: torch.Generator
) -> tuple[list[tuple[int, int]], list[bool]]:
    """One roll (rows, columns) and one flip for each step."""
    reach = int(config.roll * size)
    shifts = torch.randint(-reach, reach + 1, (config.steps, 2), generator=generator).tolist()
    flips = torch.rand(config.steps, generator=generator) < (0.5 if config.flip else 0.0)
    return [(dy, dx) for dy, dx in shifts], flips.tolist()
