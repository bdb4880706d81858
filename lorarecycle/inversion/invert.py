"""LoRA Inversion: labelled images synthesised from one adapter (LoRA Recycle, Sec. 4.1, 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Head
from ..config import InversionConfig, as_plain
from ..data.images import normalize
from ..runtime.progress import track
from ..runtime.seeds import stream
from ..runtime.steps import Compile, compiled
from ..vit.backbone import Backbone
from ..vit.lora_stack import LoRAStack
from ..vit.packed import pack
from .objective import Teachers, inversion_losses
from .painted import enlarge
from .prior import BatchNormPrior
from .start import first_canvas, step_size
from .surrogate import Surrogate


def invert(
    backbone: Backbone,
    adapter: Adapter,
    config: InversionConfig | None = None,
    *,
    prior: BatchNormPrior | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    compile: Compile = None,
    quiet: bool = False,
) -> Surrogate:
    """Synthesise labelled images that an adapter and its head recognise (Eq. 1, 2).

    Args:
        backbone: the model that the adapter was tuned on; its device is used.
        adapter: with a head.
        config: settings; `InversionConfig()` when None.
        prior: naturalness prior; `config.prior` is loaded when None (nothing where that is None too).
        seed: of the noise and the augmentation.
        dtype: precision of the teacher, into which it is cast once the adapter is merged; the backbone's when None.
        compile: whether the step runs through `torch.compile`; on a GPU only when None. A mode of `torch.compile`
            works too.
        quiet: show no progress bar.

    Returns:
        A `Surrogate` on the CPU, `config.images_per_class` images for every class of the head.

    Raises:
        ValueError: no head, an adapter that does not fit, or settings that do not fit the backbone.
        FloatingPointError: the loss of a batch was never finite.
    """
    return invert_together(
        backbone, [adapter], config, prior=prior, seed=seed, dtype=dtype, compile=compile, quiet=quiet
    )[0]


def invert_together(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    config: InversionConfig | None = None,
    *,
    prior: BatchNormPrior | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    compile: Compile = None,
    quiet: bool = False,
) -> list[Surrogate]:
    """Invert several adapters in one batch: images of all pass through the frozen weights at once.

    Each image wears the factors of its own adapter (`LoRAStack`), and each adapter has its own statistics in the
    prior, its own random numbers and its own best step: the computation is that of `invert`, but for rounding, which
    Adam amplifies, so that after many steps the images are others of the same kind. An adapter that has settled (see
    `InversionConfig.patience`) keeps its images and takes part until all have. It pays where one adapter's images are
    too few to keep the hardware busy; elsewhere merged weights are faster.

    Args:
        backbone, config, prior, seed, dtype, compile, quiet: as in `invert`; `config.batch_size` counts the images
            of one adapter.
        adapters: at least one, with heads.

    Returns:
        a `Surrogate` for each adapter, in their order.

    Raises:
        ValueError: no adapters, or several some of which adapt gated MLPs; otherwise as `invert`.
        FloatingPointError: the loss of a batch was never finite.
    """
    if not adapters:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    config = config or InversionConfig()
    heads = [check_invertible(backbone, adapter, config) for adapter in adapters]
    if len(adapters) > 1:
        check_side_by_side(backbone, adapters)
    prior = load_prior(backbone, config, dtype) if prior is None else prior
    losses_of = compiled(inversion_losses, compile, backbone.device)
    jobs = [_Job.of(*each, config, backbone.device) for each in zip(adapters, heads, strict=True)]
    # The longest first: those that have images left lead, and groups of the same numbers of classes share graphs.
    queue = sorted(jobs, key=lambda job: -len(job.head.class_names))

    def merged(job: _Job) -> Backbone:
        return backbone.merge(job.adapter).to(dtype=dtype)

    teacher_of = merged if len(jobs) > 1 else cache(merged)  # a copy of the model for each would fill the memory
    if len(jobs) > 1:
        frozen, title = backbone.clone().to(dtype=dtype), f"invert {len(jobs)} adapters"
        stack = LoRAStack([job.adapter for job in queue]).to(frozen.device, frozen.dtype)
    else:
        frozen, title, stack = teacher_of(jobs[0]), f"invert {adapters[0].name}", None
        if config.steps and losses_of is inversion_losses:  # Inductor arranges weights itself
            frozen = pack(frozen)
    rounds = len(queue[0].batches)
    with track(range(rounds * config.steps), title, quiet=quiet) as bar:
        for i in range(rounds):
            present = [job for job in queue if i < len(job.batches)]
            starts = [job.start(i, teacher_of(job), config, seed) for job in present]
            rows = [len(start.labels) for start in starts]
            teachers = Teachers.of(frozen, [job.head for job in present], rows, stack)
            done = _optimise(teachers, starts, config, prior, losses_of, bar.update)
            for job, images in zip(present, done, strict=True):
                job.images.append(images)
    return [_finish(job, teacher_of(job), config) for job in jobs]


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


def check_side_by_side(backbone: Backbone, adapters: Sequence[Adapter]) -> None:
    """Make sure that a backbone can wear adapters that are not merged.

    Raises:
        ValueError: one of them adapts a gated MLP.
    """
    for adapter in adapters:
        for site in adapter.sites:
            if ".mlp." in site and not backbone.has_plain_mlp(int(site.split(".")[1])):
                raise ValueError(
                    f"`adapters` that are inverted together must leave gated MLPs alone, got {adapter.name!r} with "
                    f"{site}; invert them one by one (`adapters_per_batch=1`)."
                )


def load_prior(backbone: Backbone, config: InversionConfig, dtype: torch.dtype | None = None) -> BatchNormPrior | None:
    """The prior that the settings name, on the backbone's device; None where they name none."""
    if config.prior is None or config.prior_weight == 0 or config.steps == 0:
        return None
    return BatchNormPrior.load(config.prior, size=config.prior_size, dtype=dtype).to(backbone.device)


class _Start(NamedTuple):
    """Everything drawn for one batch of one adapter."""

    name: str
    """Of the adapter."""
    canvas: Tensor
    """float32 [B, 3, s, s], normalised."""
    labels: Tensor
    """int64 [B]."""
    shifts: list[tuple[int, int]]
    """Roll of each step, rows and columns."""
    flips: list[bool]
    """Whether each step sees mirror images."""

    def seen(self, images: Tensor, step: int) -> Tensor:
        """Its images as a step sees them."""
        rolled = images.roll(self.shifts[step], dims=(2, 3))
        return rolled.flip(-1) if self.flips[step] else rolled


@dataclass(eq=False)
class _Job:
    """One adapter on its way to a surrogate."""

    adapter: Adapter
    head: Head
    digest: str
    batches: tuple[Tensor, ...]
    """Wanted classes of the images, batch after batch."""
    images: list[Tensor] = field(default_factory=list)
    """Finished batches, uint8 [B, 3, H, W]."""

    @classmethod
    def of(cls, adapter: Adapter, head: Head, config: InversionConfig, device: torch.device) -> _Job:
        labels = torch.arange(len(head.class_names)).repeat(config.images_per_class)
        return cls(adapter, head.to(device), adapter.digest(), labels.split(config.batch_size))

    def start(self, i: int, teacher: Backbone, config: InversionConfig, seed: int) -> _Start:
        generator = stream(seed, "inversion", self.digest, i)
        labels = self.batches[i].to(teacher.device)
        canvas = first_canvas(teacher, self.head, labels, config, generator)
        return _Start(self.adapter.name, canvas, labels, *_augmentation(config, canvas.shape[-1], generator))


def _optimise(
    teachers: Teachers,
    starts: Sequence[_Start],
    config: InversionConfig,
    prior: BatchNormPrior | None,
    losses_of: Callable[..., Tensor],
    advance: Callable[[int], object],
) -> list[Tensor]:
    """Images uint8 [B, 3, H, W] of each adapter, of the step with its lowest loss."""
    backbone, rows = teachers.backbone, teachers.rows
    size, device = config.image_size or backbone.image_size, backbone.device
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    low, high = -mean / std, (1 - mean) / std
    labels = torch.cat([start.labels for start in starts])
    x = torch.cat([start.canvas for start in starts]).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=config.lr, betas=config.betas)
    best, best_loss = x.detach().clone(), torch.full((len(rows),), torch.inf, device=device)
    prune_from = round(config.prune_from * config.steps) if config.prune else 0
    settled, moving = best_loss, torch.ones_like(best_loss, dtype=torch.bool)
    for step in range(config.steps):
        seen = torch.cat([start.seen(part, step) for start, part in zip(starts, x.split(rows), strict=True)])
        prune = config.prune if step >= prune_from else None
        losses = losses_of(teachers, seen, labels, prune, prior, config.prior_weight, size)
        optimizer.param_groups[0]["lr"] = step_size(step, config)
        optimizer.zero_grad()
        losses.sum().backward()
        with torch.no_grad():
            better = (losses < best_loss) & moving  # stays on the device: no synchronisation at every step
            best_loss = torch.where(better, losses, best_loss)
            best = torch.where(better[teachers.owners].view(-1, 1, 1, 1), x, best)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(low, high)
        advance(1)
        if config.patience is not None and step >= prune_from and (step + 1) % config.patience == 0:
            moving = moving & (best_loss <= 0.99 * settled)
            if not moving.any():
                advance(config.steps - step - 1)
                break
            settled = best_loss
    if config.steps and not best_loss.isfinite().all():
        lost = ", ".join(start.name for start, loss in zip(starts, best_loss.tolist(), strict=True) if loss == math.inf)
        raise FloatingPointError(f"the loss of adapter {lost} was never finite in {config.steps} steps; lower `lr`.")
    pixels = (enlarge(best, size).clamp(low, high) * std + mean) * 255
    return list(pixels.round().to(torch.uint8).cpu().split(rows))


def _augmentation(
    config: InversionConfig, size: int, generator: torch.Generator
) -> tuple[list[tuple[int, int]], list[bool]]:
    """One roll (rows, columns) and one flip for each step."""
    reach = int(config.roll * size)
    shifts = torch.randint(-reach, reach + 1, (config.steps, 2), generator=generator).tolist()
    flips = torch.rand(config.steps, generator=generator) < (0.5 if config.flip else 0.0)
    return [(dy, dx) for dy, dx in shifts], flips.tolist()


@torch.no_grad()
def _finish(job: _Job, teacher: Backbone, config: InversionConfig) -> Surrogate:
    """Teacher logits, scores and kept tokens of the finished images."""
    head, images = job.head, torch.cat(job.images)
    logits, scores, kept = [], [], []
    for chunk in images.split(config.batch_size):
        x = normalize(chunk.to(teacher.device), teacher.mean, teacher.std)
        encoding = teacher.encode(x, scores=True)
        assert encoding.scores is not None
        logits.append(head(teacher.pool(encoding.tokens, head.pool)).cpu())
        scores.append(encoding.scores.cpu())
        if config.prune:
            index = teacher.encode(x, prune=config.prune, class_token_only=True).kept
            assert index is not None
            kept.append(index.cpu())
    return Surrogate(
        images=images,
        labels=torch.cat(job.batches),
        teacher_logits=torch.cat(logits),
        class_names=head.class_names,
        patch_size=teacher.patch_size,
        kept=torch.cat(kept) if kept else None,
        scores=torch.cat(scores),
        adapter=job.adapter.name,
        adapter_digest=job.digest,
        config=as_plain(config),
    )
