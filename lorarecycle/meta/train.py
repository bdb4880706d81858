"""Meta-training of the meta-LoRA on episodes of surrogate images (LoRA Recycle, Sec. 4.2, Eq. 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import MetaConfig, as_config, as_plain
from ..inversion.surrogate import Surrogate
from ..runtime.checkpoint import Checkpoint
from ..runtime.distributed import ALONE, Group
from ..runtime.graphs import Graphs, adam, state_of
from ..runtime.progress import Stopwatch, track
from ..runtime.steps import Compile, compiling
from ..vit.backbone import Backbone
from ..vit.lora import LoRA
from .bank import AnySurrogate, content_digest, fill_bank
from .drawn import DrawnImages, all_of
from .draws import Draws
from .episodes import EpisodeSampler, ImageSampler
from .factors import random_factors
from .guide import feature_targets
from .shares import own_shares
from .step import EpisodeStep
from .warm_start import start_factors

CHECKPOINT_EVERY = 100


class MetaTraining(NamedTuple):
    """What meta-training leaves."""

    meta_lora: Adapter
    """Without a head."""
    losses: Tensor
    """float32 [steps]: loss of every step."""
    seconds: dict[str, float]
    """that each stage took"""


def meta_train(
    backbone: Backbone,
    surrogates: Sequence[AnySurrogate],
    *,
    config: MetaConfig | Mapping[str, Any] | None = None,
    adapters: Sequence[Adapter] = (),
    start: LoRA | None = None,
    drawn: DrawnImages | None = None,
    memory_budget: int | None = None,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    name: str = "meta-lora",
    compile: Compile = None,
    graphs: Graphs = None,
    quiet: bool = False,
    group: Group = ALONE,
) -> MetaTraining:
    """Train a meta-LoRA so that class centres of a few images classify the rest.

    Within an adapter's classes the student follows the teacher's stored logits (KL, Eq. 3a), across adapters the
    labels (cross-entropy, Eq. 4). With `config.guide_weight` its features follow those of a guide as well, or (at 1,
    the default) instead: those of the warm start, or of the plain backbone where there is none, at a higher resolution
    (see `feature_targets`). Then labels and logits are not needed and episodes are any images.

    Args:
        backbone: frozen; its device and dtype are used.
        surrogates: of one image size; real images work too. `StoredSurrogate`s, which are files, come with `drawn`.
        config: settings, or a mapping of those that differ; `MetaConfig()` when None.
        adapters: what `init="adapters"` starts from (see `warm_start`); heads are not needed.
        start: what `init="adapters"` leads to, where it has been computed already; trained in place.
        drawn: the draws, where `surrogates` hold no other images than those (see `find_drawn`); drawn here when None.
        memory_budget: bytes of images that may be held on the device; those of `StoredSurrogate`s are read step by
            step, ahead of it, where they are more. No limit when None.
        seed: of the first factors, the episodes and the flips.
        checkpoint: safetensors file written every 100 steps and at the end; where it exists, training goes on from it.
        name: of the meta-LoRA.
        compile: whether the backbone's blocks run through `torch.compile`; on a GPU, for thousands of steps, when None.
        graphs: whether a step is one launch, a CUDA graph; on a GPU only when None. What does not fit is run as it is.
        quiet: show no progress bar.
        group: the processes that train together, each with the same arguments: they share out the episodes of a step
            and the guide's images, add up their gradients, and end with the same meta-LoRA. The first one reads and
            writes the checkpoint.

    Returns:
        `MetaTraining(meta_lora, losses, seconds)`.

    Raises:
        ValueError: too few classes or images, surrogates that do not go together or lack what the loss needs, a
            checkpoint of other settings, no adapters where training starts from them.
        OSError: a `checkpoint` that cannot be written there.
    """
    config = as_config(MetaConfig, config)
    if config.init == "adapters" and not adapters:
        raise ValueError("`adapters` must be given to start from them, got none; pass them, or set init='random'.")
    clock = Stopwatch()
    lora = first_factors(backbone, adapters, config, seed) if start is None else start
    group.share(lora.parameters())
    guide = None
    if config.init == "adapters":
        guide = lora.to_adapter(name="guide", like=backbone)
        if start is None:
            clock.lap("warm start")
    if config.steps == 0:
        return MetaTraining(lora.to_adapter(name=name, like=backbone), torch.zeros(0), clock.laps)
    if drawn is None:
        kind = ImageSampler if config.guide_weight == 1 else EpisodeSampler
        held = [s for s in surrogates if isinstance(s, Surrogate)]
        if len(held) < len(surrogates):
            raise ValueError(
                "`drawn` must be given with surrogates in files, got none; load them, or see `find_drawn`."
            )
        drawn = all_of(kind(held, config, seed), sum(len(s.images) for s in held))
    lower = config.resolutions
    bank = fill_bank(backbone, surrogates, config.sparsity, budget=memory_budget, resolutions=lower)
    clock.restart()
    if config.guide_weight > 0:
        targets = feature_targets(
            backbone,
            guide,
            bank.all_images,
            kept=bank.kept,
            image_size=config.guide_size,
            flip=config.flip,
            shift=config.guide_shift,
            quiet=quiet,
            group=group,
        )
        bank = bank._replace(targets=targets)
        clock.lap("guide features")
    lr = default_lr(backbone.embed_dim) if config.lr is None else config.lr
    device = backbone.device
    optimizer = adam(lora.parameters(), device)
    losses = torch.zeros(config.steps, device=device)
    run = {
        "config": as_plain(config),
        "seed": seed,
        "surrogates": [content_digest(s) for s in surrogates] if checkpoint is not None else [],
        "adapters": [a.weights_digest() for a in adapters] if config.init == "adapters" else [],
        "backbone": backbone.digest(),
        "dtype": str(backbone.dtype),
    }
    saved = Checkpoint(
        checkpoint, run, modules={"lora": lora}, optimizer=optimizer, histories={"loss": losses}, steps=config.steps
    )
    done = saved.resume() if group.leads else 0
    if group.size > 1:
        counted = torch.tensor([done], device=device)
        group.share([counted, losses, *lora.parameters(), *state_of(optimizer)])
        done = int(counted)
    clock.restart()
    rates = torch.tensor([learning_rate(step, config, lr) for step in range(config.steps)], device=device)
    draws = Draws.of(drawn.__call__, config, seed, first=done, device=device)
    step = EpisodeStep(
        backbone,
        lora,
        bank,
        own_shares(draws, config, group),
        rates,
        config,
        optimizer=optimizer,
        losses=losses,
        done=done,
        graphs=graphs,
        group=group,
    )
    with compiling(compile, device, config.steps - done), closing(step):
        for i in track(range(done, config.steps), "meta-training", quiet=quiet, initial=done):
            step()
            if ((i + 1) % CHECKPOINT_EVERY == 0 or i + 1 == config.steps) and group.leads:
                saved.write(i + 1)
    clock.lap("meta-training")
    return MetaTraining(lora.to_adapter(name=name, like=backbone), losses.cpu(), clock.laps)


def first_factors(backbone: Backbone, adapters: Sequence[Adapter], config: MetaConfig, seed: int) -> LoRA:
    """What training starts from: the warm start of the adapters, or random factors; errors as in `random_factors`."""
    lora = random_factors(backbone, config, seed)
    return start_factors(adapters, lora, backbone, gain=config.warm_start_gain) if config.init == "adapters" else lora


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
