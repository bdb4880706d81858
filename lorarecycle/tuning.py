"""Tune one adapter and its head on labelled images."""

from __future__ import annotations

import logging
import math
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.adapter import Adapter, Head
from .config import TuneConfig
from .data.dataset import LabelledImages
from .data.images import normalize
from .runtime.progress import track
from .vit.backbone import Backbone
from .vit.lora import LoRA

logger = logging.getLogger(__name__)


def tune(
    backbone: Backbone,
    data: LabelledImages,
    config: TuneConfig | None = None,
    *,
    name: str = "adapter",
    checkpoints: str | PathLike[str] | None = None,
    quiet: bool = False,
) -> Adapter:
    """Tune LoRA factors with a linear head on the class-token feature, by Adam (Sec. 5).

    Same arguments, same bits on the CPU at the same number of threads.

    Args:
        backbone: stays frozen and unchanged.
        data: images of at least two classes; resized to `backbone.image_size`.
        config: settings; the defaults of `TuneConfig` when None.
        name: of the adapter.
        checkpoints: folder for the adapters after each of the last `config.save_last` epochs, PEFT folders
            `epoch-0101` and so on (counted from 1; the last one is the adapter returned).
        quiet: no progress bar.

    Returns:
        the adapter, with its head and class names, on the CPU.

    Raises:
        ValueError: fewer than two classes, a class without images, sites or layers that the backbone lacks;
            `save_last` without a folder, a folder without `save_last`, or one that holds other checkpoints.
        FloatingPointError: the loss became NaN or infinite.
    """
    config = config or TuneConfig()
    _check(data)
    folder = _checkpoint_folder(checkpoints, config.save_last)
    generator = torch.Generator().manual_seed(config.seed)
    lora = LoRA.random(
        backbone,
        r=config.r,
        lora_alpha=config.lora_alpha,
        sites=config.sites,
        layers=config.layers,
        generator=generator,
    )
    head = _linear(backbone.embed_dim, len(data.class_names), generator).to(backbone.device)
    optimizer = torch.optim.Adam([*lora.parameters(), *head.parameters()], lr=config.lr)
    data = data.resize(backbone.image_size)
    steps = math.ceil(len(data) / config.batch_size)  # of an epoch
    bar = track(range(config.epochs * steps), f"tune {name}", quiet=quiet)
    order: tuple[Tensor, ...] = ()
    for step in bar:
        if not order:
            order = torch.randperm(len(data), generator=generator).split(config.batch_size)
        index, order = order[0], order[1:]
        labels = data.labels[index].to(backbone.device)
        pixels = data.images[index].to(backbone.device)
        if config.flip:
            mirrored = torch.rand(len(index), generator=generator).to(backbone.device) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        features = backbone(normalize(pixels, backbone.mean, backbone.std, backbone.dtype), lora=lora)
        logits = head(features.float())
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step + 1 == bar.total:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss of tuning {name!r} became {value} at step {step}; lower `lr`.")
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            logger.debug("%s step %d loss %.4f", name, step, value)
        epoch, rest = divmod(step + 1, steps)
        if folder is not None and not rest and epoch > config.epochs - config.save_last:
            checkpoint = _snapshot(lora, head, f"{name}-epoch-{epoch:04d}", backbone, data)
            checkpoint.save(folder / f"epoch-{epoch:04d}")
    return _snapshot(lora, head, name, backbone, data)


def _snapshot(lora: LoRA, head: nn.Linear, name: str, backbone: Backbone, data: LabelledImages) -> Adapter:
    """What has been learnt so far, copied to the CPU."""
    classifier = Head(head.weight.detach().cpu().clone(), head.bias.detach().cpu().clone(), data.class_names)
    return lora.to_adapter(name=name, like=backbone, head=classifier)


def _checkpoint_folder(checkpoints: str | PathLike[str] | None, save_last: int) -> Path | None:
    if (checkpoints is None) == (save_last > 0):
        raise ValueError(
            f"`checkpoints` must name a folder where `save_last` is positive and only there, got {checkpoints!r} "
            f"with save_last={save_last}; give both or none."
        )
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`checkpoints` must be a new or empty folder, got {folder} with content; choose another.")
    return folder


def _check(data: LabelledImages) -> None:
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
