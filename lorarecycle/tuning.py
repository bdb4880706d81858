"""Tune one adapter and its head on labelled images."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.adapter import Adapter, Head
from .config import TuneConfig, as_config, as_plain
from .data.dataset import LabelledImages
from .data.images import normalize
from .data.lazy import Dataset, require_labelled
from .runtime.checkpoint import Checkpoint
from .runtime.files import require_place
from .runtime.graphs import Graphs, Step, adam, held_weakly, state_of
from .runtime.progress import track
from .runtime.seeds import stream
from .runtime.steps import Compile, check_compile, compiling
from .vit.backbone import Backbone
from .vit.lora import LoRA

logger: logging.Logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 100
READ_EVERY = 50
"""Steps between looks at the loss: each look waits for the GPU."""


def tune(
    backbone: Backbone,
    data: LabelledImages | Dataset,
    *,
    config: TuneConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    name: str = "adapter",
    checkpoint: str | PathLike[str] | None = None,
    checkpoints: str | PathLike[str] | None = None,
    compile: Compile = None,
    graphs: Graphs = None,
    quiet: bool = False,
) -> Adapter:
    """Tune LoRA factors with a linear head on the class-token feature, by Adam (Sec. 5).

    Same arguments, same bits on the CPU at the same number of threads. Equal seeds start from equal factors, whatever
    the data; the order of the images and what is mirrored follow from seed, epoch and step.

    Args:
        backbone: stays frozen and unchanged.
        data: images of at least two classes, in memory or on disk; brought to size as `backbone.fit` says.
        config: settings, or a mapping of those that differ from the defaults of `TuneConfig`.
        seed: of everything random, in place of the settings'.
        name: of the adapter.
        checkpoint: safetensors file written every 100 steps and at the end; where it exists, tuning goes on from it and
            ends with the same bits.
        checkpoints: folder for the adapters after each of the last `config.save_last` epochs, PEFT folders
            `epoch-0101` and so on (counted from 1; the last one is the adapter returned).
        compile: whether the backbone's blocks run through `torch.compile`; on a GPU, for thousands of steps, when None.
        graphs: whether a step is one launch, a CUDA graph; on a GPU only when None. What does not fit is run as it is.
        quiet: no progress bar.

    Returns:
        the adapter, with its head and class names, on the CPU.

    Raises:
        ValueError: fewer than two classes, a class without images, sites or layers that the backbone lacks; a
            `checkpoint` that is damaged, or of other settings, data, seed or backbone; `save_last` without a folder, a
            folder without `save_last`, or one that holds what this tuning did not write.
        OSError: a `checkpoint` or `checkpoints` that cannot be written there.
        TypeError: `config` names no setting; `data` that is neither `LabelledImages` nor a `Dataset`.
        FloatingPointError: the loss became NaN or infinite.
    """
    config = as_config(TuneConfig, config)
    config = config if seed is None else replace(config, seed=seed)
    _check(data)
    folder = _checkpoint_folder(checkpoints, config.save_last)
    data = data.load(backbone.fit, quiet=quiet) if isinstance(data, Dataset) else data
    lora = LoRA.random(
        backbone,
        r=config.r,
        lora_alpha=config.lora_alpha,
        sites=config.sites,
        layers=config.layers,
        generator=stream(config.seed, "tune", "factors"),
    )
    head = _linear(backbone.embed_dim, len(data.class_names), stream(config.seed, "tune", "head")).to(backbone.device)
    optimizer = adam([*lora.parameters(), *head.parameters()], backbone.device)
    data = data.resize(backbone.fit)
    per_epoch = math.ceil(len(data) / config.batch_size)
    steps = config.epochs * per_epoch
    saved = Checkpoint(
        checkpoint,
        {} if checkpoint is None else _run(backbone, data, config),
        modules={"lora": lora, "head": head},
        optimizer=optimizer,
        histories={},
        steps=steps,
    )
    done = saved.resume()
    learning = _Steps(backbone, lora, head, optimizer, config.lr, graphs)

    def keep(step: int) -> None:
        """Save the adapter where an epoch that is to be kept ends with this step."""
        epoch = _kept_epoch(step, per_epoch, config)
        if folder is not None and epoch:
            _snapshot(lora, head, f"{name}-epoch-{epoch:04d}", backbone, data).save(folder / f"epoch-{epoch:04d}")

    if folder is not None:
        _require_own(folder, done // per_epoch, _kept_epoch(done, per_epoch, config), config)
    keep(done)  # stopped between checkpoint and adapter
    order: tuple[Tensor, ...] = ()
    bar = track(range(done, steps), f"tune {name}", quiet=quiet, initial=done)
    fast = check_compile(compile, backbone.device, steps - done)
    for step in bar:
        epoch, batch = divmod(step, per_epoch)
        if not batch or not order:
            generator = stream(config.seed, "tune", "order", epoch)
            order = torch.randperm(len(data), generator=generator).split(config.batch_size)
        index = order[batch]
        mirrored = torch.rand(len(index), generator=stream(config.seed, "tune", "flip", step)) < 0.5
        with compiling(fast, backbone.device):
            learning(data.images[index], data.labels[index], mirrored & config.flip)
        if step % READ_EVERY == 0 or step + 1 == steps:
            value = learning.loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of tuning {name!r} became {value} at step {step}; lower `lr`.")
            bar.set_postfix(loss=f"{value:.3f}")
            logger.debug("%s step %d loss %.4f", name, step, value)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps or _kept_epoch(step + 1, per_epoch, config):
            saved.write(step + 1)  # first: the folder never holds adapters that the checkpoint knows nothing of
        keep(step + 1)
    return _snapshot(lora, head, name, backbone, data)


class _Steps:
    """Optimiser steps on batches; each number of images has buffers that stay where they are, and a `Step`."""

    def __init__(
        self,
        backbone: Backbone,
        lora: LoRA,
        head: nn.Linear,
        optimizer: torch.optim.Optimizer,
        lr: float,
        graphs: Graphs,
    ) -> None:
        self.backbone, self.lora, self.head, self.optimizer, self.graphs = backbone, lora, head, optimizer, graphs
        self.loss = torch.zeros((), device=backbone.device)
        rate: Tensor = optimizer.param_groups[0]["lr"]
        rate.fill_(lr)
        self._of: dict[int, tuple[list[Tensor], Step]] = {}

    def __call__(self, *batch: Tensor) -> None:
        """Take a step on images uint8 [B, 3, H, W], labels int64 [B] and whether each is mirrored, bool [B]."""
        n = len(batch[0])
        if n not in self._of:
            there = [torch.empty_like(part, device=self.backbone.device) for part in batch]
            run, state = held_weakly(self._take, *there), held_weakly(self._state)
            self._of[n] = there, Step(run, state, self.backbone.device, self.graphs)
        there, step = self._of[n]
        for own, part in zip(there, batch, strict=True):
            own.copy_(part)
        step()

    def _take(self, pixels: Tensor, labels: Tensor, mirrored: Tensor) -> None:
        backbone = self.backbone
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        features = backbone(normalize(pixels, backbone.mean, backbone.std, backbone.dtype), lora=self.lora)
        loss = F.cross_entropy(self.head(features.float()), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _state(self) -> list[Tensor]:
        return [*self.lora.parameters(), *self.head.parameters(), *state_of(self.optimizer)]


def _run(backbone: Backbone, data: LabelledImages, config: TuneConfig) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    settings = as_plain(config)
    seed = settings.pop("seed")
    sha = hashlib.sha256(repr((data.class_names, list(data.images.shape))).encode())
    for tensor in (data.labels, data.images):
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return {"settings": settings, "seed": seed, "data": sha.hexdigest(), "backbone": backbone.digest()}


def _kept_epoch(step: int, per_epoch: int, config: TuneConfig) -> int:
    """The epoch, counted from 1, that ends with this step and whose adapter is kept; 0 for none."""
    epoch, rest = divmod(step, per_epoch)
    return epoch if not rest and epoch > config.epochs - config.save_last else 0


def _snapshot(lora: LoRA, head: nn.Linear, name: str, backbone: Backbone, data: LabelledImages) -> Adapter:
    """What has been learnt so far, copied to the CPU."""
    weight, bias = head.weight.detach().cpu().clone(), head.bias.detach().cpu().clone()
    classifier = Head(weight, bias, data.class_names, backbone.own_pool)
    return lora.to_adapter(name=name, like=backbone, head=classifier)


def _checkpoint_folder(checkpoints: str | PathLike[str] | None, save_last: int) -> Path | None:
    if (checkpoints is None) == (save_last > 0):
        raise ValueError(
            f"`checkpoints` must name a folder where `save_last` is positive and only there, got {checkpoints!r} "
            f"with save_last={save_last}; give both or none."
        )
    return None if checkpoints is None else Path(checkpoints).expanduser()


def _require_own(folder: Path, epochs: int, last: int, config: TuneConfig) -> None:
    """Raise unless a folder holds the adapters of the epochs that are done (the last may be absent), and no others."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`checkpoints` must be a folder, got the file {folder}; choose another.")
    require_place(folder, "checkpoints", folder=True)
    found = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    done = {f"epoch-{epoch:04d}": epoch for epoch in range(config.epochs - config.save_last + 1, epochs + 1)}
    foreign = sorted(found - done.keys())
    if foreign:
        raise ValueError(
            f"`checkpoints` must be a new or empty folder, or that of the tuning that goes on, got {folder} with "
            f"{foreign[0]} in it; choose another."
        )
    missing = [name for name, epoch in done.items() if name not in found and epoch != last]
    if missing:
        raise ValueError(
            f"`checkpoints` must hold the adapters of the epochs that are done, got {folder} without {missing[0]}; "
            "put it back, or remove the checkpoint to start anew."
        )


def _check(data: LabelledImages | Dataset) -> None:
    require_labelled(data, "data")
    if len(data.class_names) < 2:
        raise ValueError(f"`data` must have at least two classes, got {list(data.class_names)}.")
    empty = [name for name, n in zip(data.class_names, data.counts, strict=True) if n == 0]
    if empty:
        raise ValueError(f"`data` must have images of every class, got none of {empty}; use `select_classes`.")


def _linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with torch's usual start, drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features)
    bound = 1 / math.sqrt(in_features)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
