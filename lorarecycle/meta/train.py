"""Meta-training of the meta-LoRA on episodes of surrogate images (LoRA Recycle, Sec. 4.2, Eq. 3 and 4)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import MetaConfig, as_plain
from ..data.images import normalize
from ..inversion.surrogate import Surrogate
from ..runtime.files import load_tensors, save_tensors
from ..runtime.progress import track
from ..runtime.seeds import stream
from ..runtime.steps import Compile, compiled
from ..vit.backbone import Backbone
from ..vit.lora import LoRA
from ..vit.positions import mirror
from .episodes import Episode, EpisodeSampler
from .guide import feature_targets
from .prototypes import distance_logits
from .warm_start import common_gain, warm_start

CHECKPOINT_EVERY = 100


class MetaTraining(NamedTuple):
    """What meta-training leaves."""

    meta_lora: Adapter
    """Without a head."""
    losses: Tensor
    """float32 [steps]: loss of every episode."""


class Bank(NamedTuple):
    """All surrogates side by side on the backbone's device."""

    images: Tensor
    """uint8 [n, 3, H, W]"""
    teacher_logits: Tensor
    """float32 [n, C], padded with zeros to the largest number of classes"""
    kept: Tensor | None
    """int64 [n, k]"""
    columns: int
    """patches in a row of the grid"""
    targets: Tensor | None = None
    """float32 [n, D], features to follow"""


def meta_train(
    backbone: Backbone,
    surrogates: Sequence[Surrogate],
    config: MetaConfig | None = None,
    *,
    adapters: Sequence[Adapter] = (),
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    name: str = "meta-lora",
    compile: Compile = None,
    quiet: bool = False,
) -> MetaTraining:
    """Train a meta-LoRA so that class centres of a few images classify the rest.

    Within an adapter's classes the student follows the teacher's stored logits (KL, Eq. 3a), across adapters the
    labels (cross-entropy, Eq. 4). With `config.distill` its features follow those of a guide as well, or (at 1, the
    default) instead: those of the warm start, or of the plain backbone where there is none, at a higher resolution (see
    `feature_targets`).

    Args:
        backbone: frozen; its device and dtype are used.
        surrogates: of one image size; real images work too.
        config: settings; `MetaConfig()` when None.
        adapters: what `init="adapters"` starts from (see `warm_start`); heads are not needed.
        seed: of the first factors, the episodes and the flips.
        checkpoint: safetensors file written every 100 steps; where it exists, training goes on from it.
        name: of the meta-LoRA.
        compile: whether the step runs through `torch.compile`; on a GPU only when None. A mode of `torch.compile`
            works too.
        quiet: show no progress bar.

    Returns:
        `MetaTraining(meta_lora, losses)`.

    Raises:
        ValueError: too few classes or images, surrogates that do not go together, a checkpoint of other settings, no
            adapters where training starts from them.
    """
    config = config or MetaConfig()
    if config.init == "adapters" and not adapters:
        raise ValueError("`adapters` must be given to start from them, got none; pass them, or set init='random'.")
    sampler = EpisodeSampler(surrogates, config, seed)
    bank = fill_bank(backbone, surrogates, config.sparsity)
    lora = random_factors(backbone, config, seed)
    guide = None
    if config.init == "adapters":
        gain = common_gain(adapters, lora, backbone) if config.gain is None else config.gain
        lora = warm_start(adapters, lora, gain=gain)
        guide = lora.to_adapter(name="guide", like=backbone)
    if config.distill > 0:
        targets = feature_targets(
            backbone,
            guide,
            bank.images,
            kept=bank.kept,
            image_size=config.guide_size,
            flip=config.flip,
        )
        bank = bank._replace(targets=targets)
    lr = default_lr(backbone.embed_dim) if config.lr is None else config.lr
    optimizer = torch.optim.Adam(lora.parameters(), lr=config.lr_min)
    losses = torch.zeros(config.steps, device=backbone.device)
    run = {
        "config": as_plain(config),
        "seed": seed,
        "surrogates": [s.adapter_digest for s in surrogates],
        "adapters": [a.digest() for a in adapters] if config.init == "adapters" else [],
        "backbone": backbone.digest(),
    }
    loss_of = compiled(query_loss, compile, backbone.device)
    done = 0 if checkpoint is None else _resume(Path(checkpoint), run, lora, optimizer, losses)
    for step in track(range(done, config.steps), "meta-train", quiet=quiet, initial=done):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config, lr)
        generator = stream(seed, "flip", step)
        loss = episode_loss(backbone, lora, bank, sampler(step), config, generator, loss_of)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0:
            _write_checkpoint(Path(checkpoint), run, lora, optimizer, losses, step + 1)
    return MetaTraining(lora.to_adapter(name=name, like=backbone), losses.cpu())


def random_factors(backbone: Backbone, config: MetaConfig, seed: int) -> LoRA:
    """Random factors of the meta-LoRA, once everything about it is known to fit the backbone.

    Raises:
        ValueError: blocks that the backbone does not have, sites that cannot be trained in it, or a `guide_size` that
            its patch size does not divide.
    """
    blocks = range(backbone.num_blocks)
    if config.layers is not None and not set(config.layers) <= set(blocks):
        raise ValueError(f"`layers` must be some of 0 to {backbone.num_blocks - 1}, got {config.layers}.")
    for i in blocks if config.layers is None else config.layers:
        if {"fc1", "fc2"} & set(config.sites) and not backbone.has_plain_mlp(i):
            raise ValueError(f"`sites` must leave out fc1 and fc2 for {backbone.name!r}, whose MLPs are gated.")
    if config.guide_size is not None and config.guide_size % backbone.patch_size:
        raise ValueError(
            f"`guide_size` must be a multiple of the patch {backbone.patch_size}, got {config.guide_size}."
        )
    return LoRA.random(
        backbone,
        r=config.r,
        lora_alpha=config.lora_alpha,
        sites=config.sites,
        layers=config.layers,
        generator=stream(seed, "meta-lora"),
    )


def default_lr(embed_dim: int) -> float:
    """5e-3 up to width 192, where it was chosen; above that as 1 / width (Yang et al. 2022, Tensor Programs V)."""
    return 5e-3 * min(1, 192 / embed_dim)


def learning_rate(step: int, config: MetaConfig, lr: float) -> float:
    """Cycles: a quarter linear from `lr_min` to `lr`, the rest cosine back (Sec. 5, implementation details)."""
    cycle = min(config.cycle, config.steps)
    warmup, phase = cycle // 4, step % cycle
    if phase < warmup:
        return config.lr_min + (lr - config.lr_min) * phase / warmup
    progress = (phase - warmup) / (cycle - warmup)
    return config.lr_min + (lr - config.lr_min) * (1 + math.cos(math.pi * progress)) / 2


def fill_bank(backbone: Backbone, surrogates: Sequence[Surrogate], sparsity: float | None = None) -> Bank:
    """Put surrogates side by side.

    Args:
        backbone: model that will see them.
        surrogates: of one image size.
        sparsity: mask every surrogate to this share from its scores; None takes their kept tokens as they are.

    Raises:
        ValueError: sizes, patch size or numbers of kept tokens that differ.
    """
    if sparsity is not None:
        surrogates = [s.masked(sparsity) for s in surrogates]
    for what, values in (
        ("image size", [tuple(s.images.shape[-2:]) for s in surrogates]),
        ("patch size", [s.patch_size for s in surrogates] + [backbone.patch_size]),
        ("number of kept tokens", [None if s.kept is None else s.kept.shape[1] for s in surrogates]),
    ):
        if len(set(values)) > 1:
            raise ValueError(
                f"`surrogates` must share one {what}, got {sorted(set(values), key=str)}; invert them anew."
            )
    width = max(s.teacher_logits.shape[1] for s in surrogates)
    logits = [F.pad(s.teacher_logits, (0, width - s.teacher_logits.shape[1])) for s in surrogates]
    kept = [s.kept for s in surrogates if s.kept is not None]
    device = backbone.device
    return Bank(
        torch.cat([s.images for s in surrogates]).to(device),
        torch.cat(logits).to(device),
        torch.cat(kept).to(device) if kept else None,
        surrogates[0].grid[1],
    )


def episode_loss(
    backbone: Backbone,
    lora: LoRA,
    bank: Bank,
    episode: Episode,
    config: MetaConfig,
    generator: torch.Generator,
    loss_of: Callable[..., Tensor],
) -> Tensor:
    """Loss of one episode, a float32 scalar: Eq. 3 within an adapter, Eq. 4 across adapters.

    `loss_of` is `query_loss` or its compiled form; everything around it is gathering and drawing.
    """
    device = backbone.device
    rows, labels = episode.images.to(device), episode.labels.to(device)
    images, kept = bank.images[rows], None if bank.kept is None else bank.kept[rows]
    if config.flip:
        flip = (torch.rand(len(rows), generator=generator) < 0.5).to(device)
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        kept = None if kept is None else torch.where(flip.view(-1, 1), mirror(kept, bank.columns), kept)
    S = config.n_way * config.n_shot
    if episode.cross_task:
        targets = F.one_hot(labels[S:], config.n_way).float()
    else:
        targets = bank.teacher_logits[rows[S:]][:, episode.teacher_classes.to(device)].softmax(-1)
    images = normalize(images, backbone.mean, backbone.std, backbone.dtype)
    follow = None if bank.targets is None else bank.targets[rows]
    return loss_of(backbone, lora, images, kept, targets, config, follow)


def query_loss(
    backbone: Backbone,
    lora: LoRA,
    images: Tensor,
    kept: Tensor | None,
    targets: Tensor,
    config: MetaConfig,
    follow: Tensor | None = None,
) -> Tensor:
    """KL of the targets from the nearest-centre probabilities (Eq. 3); the cross-entropy of Eq. 4 for one-hot targets.

    Args:
        backbone: wears `lora`.
        images: normalised, [n_way * (n_shot + n_query), 3, H, W]: the support, class after class, then the queries.
        kept: int64 [images, k], patches to read; all when None.
        targets: class probabilities of the queries, float32 [n_way * n_query, n_way].
        config: n_way, n_shot, distance, distill.
        follow: features that those of the images should have, float32 [images, D]: their mean squared distance has
            the share `distill` of the loss.
    """
    features = backbone(images, lora=lora, kept=kept).float()
    if follow is not None and config.distill == 1:
        return F.mse_loss(features, follow)
    S = config.n_way * config.n_shot
    centres = features[:S].unflatten(0, (config.n_way, config.n_shot)).mean(dim=1)
    logits = distance_logits(features[S:], centres, config.distance)
    loss = F.kl_div(logits.log_softmax(-1), targets, reduction="batchmean")
    return loss if follow is None else torch.lerp(loss, F.mse_loss(features, follow), config.distill)


def _write_checkpoint(
    path: Path, run: dict[str, object], lora: LoRA, optimizer: torch.optim.Adam, losses: Tensor, step: int
) -> None:
    tensors = {f"lora.{name}": value for name, value in lora.state_dict().items()}
    for name, parameter in lora.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam.{name}.{key}"] = value
    save_tensors(path, {**tensors, "losses": losses[:step]}, {"run": run, "step": step})


def _resume(path: Path, run: dict[str, object], lora: LoRA, optimizer: torch.optim.Adam, losses: Tensor) -> int:
    """Load a checkpoint where there is one; the number of steps done."""
    if not path.exists():
        return 0
    tensors, meta = load_tensors(path)
    if json.loads(meta.get("run", "null")) != run:
        raise ValueError(f"checkpoint {path} must be of the same settings and surrogates; choose another file.")
    step = int(json.loads(meta["step"]))
    lora.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("lora.")})
    for name, parameter in lora.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"adam.{name}.{key}"].to("cpu" if key == "step" else parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    losses[:step] = tensors["losses"].to(losses.device)
    return step
