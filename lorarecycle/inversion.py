"""LoRA Inversion: labelled images synthesised from one adapter (LoRA Recycle, Sec. 4.1, 4.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapter import Adapter, Head
from .backbone import Backbone
from .canvas import first_canvas, step_size
from .compiling import Compile, compiled
from .config import InversionConfig, as_plain
from .images import normalize
from .packed import pack
from .prior import BatchNormPrior
from .progress import track
from .seeds import stream
from .shapes import enlarge
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
    config = config or InversionConfig()
    head = check_invertible(backbone, adapter, config)
    prior = load_prior(backbone, config, dtype) if prior is None else prior
    teacher = backbone.merge(adapter).to(dtype=dtype)
    head = head.to(backbone.device)
    loss_of = compiled(inversion_loss, compile, backbone.device)
    if config.steps and loss_of is inversion_loss:  # Inductor arranges weights itself
        teacher = pack(teacher)
    labels = torch.arange(len(head.class_names)).repeat(config.images_per_class)
    batches = labels.split(config.batch_size)
    digest = adapter.digest()
    images = []
    with track(range(len(batches) * config.steps), f"invert {adapter.name}", quiet=quiet) as bar:
        for i, batch in enumerate(batches):
            generator = stream(seed, "inversion", digest, i)
            images.append(_optimise(teacher, head, batch, config, prior, generator, loss_of, bar.update))
    return _finish(teacher, adapter, head, torch.cat(images), labels, config, digest)


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


def _optimise(
    teacher: Backbone,
    head: Head,
    labels: Tensor,
    config: InversionConfig,
    prior: BatchNormPrior | None,
    generator: torch.Generator,
    loss_of: Callable[..., Tensor],
    advance: Callable[[int], object],
) -> Tensor:
    """Images uint8 [B, 3, H, W] of the step with the lowest loss."""
    size = config.image_size or teacher.image_size
    device = teacher.device
    labels = labels.to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    low, high = -mean / std, (1 - mean) / std
    x = first_canvas(teacher, head, labels, config, generator).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=config.lr, betas=config.betas)
    best, best_loss = x.detach().clone(), torch.tensor(torch.inf, device=device)
    shifts, flips = _augmentation(config, x.shape[-1], generator)
    prune_from = round(config.prune_from * config.steps) if config.prune else 0
    settled = torch.tensor(torch.inf, device=device)
    for step in range(config.steps):
        seen = x.roll(shifts[step], dims=(2, 3))
        if flips[step]:
            seen = seen.flip(-1)
        prune = config.prune if step >= prune_from else None
        loss = loss_of(teacher, head, seen, labels, prune, prior, config.prior_weight, size)
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
        advance(1)
        if config.patience is not None and step >= prune_from and (step + 1) % config.patience == 0:
            if best_loss > 0.99 * settled:
                advance(config.steps - step - 1)
                break
            settled = best_loss
    if config.steps and not best_loss.isfinite():
        raise FloatingPointError(f"the loss of {teacher.name!r} was never finite in {config.steps} steps; lower `lr`.")
    pixels = (enlarge(best, size).clamp(low, high) * std + mean) * 255
    return pixels.round().to(torch.uint8).cpu()


def inversion_loss(
    teacher: Backbone,
    head: Head,
    images: Tensor,
    labels: Tensor,
    prune: dict[int, float] | None,
    prior: BatchNormPrior | None,
    prior_weight: float,
    image_size: int,
) -> Tensor:
    """Eq. 1: cross-entropy of the teacher plus the weighted batch-norm prior, a float32 scalar.

    The teacher sees the images enlarged to `image_size`, the prior as they are.
    """
    logits = head(teacher(enlarge(images, image_size), prune=prune, pool=head.pool))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return loss if prior is None else loss + prior_weight * prior(images, teacher.mean, teacher.std)


def _augmentation(
    config: InversionConfig, size: int, generator: torch.Generator
) -> tuple[list[tuple[int, int]], list[bool]]:
    """One roll (rows, columns) and one flip for each step."""
    reach = int(config.roll * size)
    shifts = torch.randint(-reach, reach + 1, (config.steps, 2), generator=generator).tolist()
    flips = torch.rand(config.steps, generator=generator) < (0.5 if config.flip else 0.0)
    return [(dy, dx) for dy, dx in shifts], flips.tolist()


@torch.no_grad()
def _finish(
    teacher: Backbone,
    adapter: Adapter,
    head: Head,
    images: Tensor,
    labels: Tensor,
    config: InversionConfig,
    digest: str,
) -> Surrogate:
    """Teacher logits, scores and kept tokens of the finished images."""
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
        labels=labels,
        teacher_logits=torch.cat(logits),
        class_names=head.class_names,
        patch_size=teacher.patch_size,
        kept=torch.cat(kept) if kept else None,
        scores=torch.cat(scores),
        adapter=adapter.name,
        adapter_digest=digest,
        config=as_plain(config),
    )
