"""A backbone with its meta-LoRA merged in, built once in a process and shared by all classifiers that use it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.peft.in_memory import is_peft_model
from ..vit.backbone import Backbone
from ..vit.base import warn_of_doubts
from ..vit.replay import ReplayedForward

BackboneSource: TypeAlias = Backbone | nn.Module | str | PathLike[str]
AdapterSource: TypeAlias = Adapter | str | PathLike[str] | Any
"""An adapter, a PEFT folder, a Hub id, or a PEFT model in memory."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """What turns images into features, and what it was made of.

    Attributes:
        source: the backbone as it was given.
        backbone: without the meta-LoRA.
        meta_lora: None when there is none.
        model: the backbone with the meta-LoRA merged in.
        plain: the encoder of the backbone alone. This one keeps it alive, so that a classifier without a meta-LoRA
            finds it in the cache and does not load the backbone again.
    """

    source: BackboneSource
    backbone: Backbone
    meta_lora: Adapter | None
    model: Backbone
    plain: Encoder | None = None

    @cached_property
    def compiled(self) -> ReplayedForward:
        """The model's forward pass with compiled blocks, as one launch on a GPU."""
        return ReplayedForward(self.model, compile=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over what decides the features: weights, size and normalisation of images, meta-LoRA.

        The merged weights stay out of it: their last bits differ between kinds of CPU.
        """
        lora = self.meta_lora.with_head(None).digest() if self.meta_lora is not None else None
        return hashlib.sha256(json.dumps([self.backbone.digest(), lora]).encode()).hexdigest()

    def recipe(self) -> EncoderRecipe:
        """How to build it in another process; without the merged weights."""
        if isinstance(self.source, (str, PathLike)):
            return EncoderRecipe(self.source, self.meta_lora, self.digest)
        source = self.source.clone() if isinstance(self.source, Backbone) else self.source  # not what it was merged of
        return EncoderRecipe(source, self.meta_lora, None)


class EncoderRecipe(NamedTuple):
    """An encoder on its way to another process."""

    source: BackboneSource
    meta_lora: Adapter | None
    digest: str | None
    """Of the encoder, where its backbone travels by name only."""

    def build(self) -> Encoder:
        """The encoder, shared as `share_encoder` does.

        Raises:
            FileNotFoundError, ValueError: the backbone cannot be had by its name, or is another one by now.
        """
        encoder = share_encoder(self.source, self.meta_lora)
        if self.digest not in (None, encoder.digest):
            raise ValueError(
                f"`backbone` {str(self.source)!r} must be the model that the pickled classifier was fitted with, got "
                "other weights or another preparation of images under that name; put the old one there, or fit again."
            )
        return encoder


_lock = threading.RLock()
_shared: WeakValueDictionary[Hashable, Encoder] = WeakValueDictionary()
_latest: list[Encoder] = []
"""The last few of one backbone: between two folds of a cross-validation no classifier is alive to keep its own."""
_KEPT = 4


def share_encoder(source: BackboneSource, meta_lora: AdapterSource | None) -> Encoder:
    """The encoder of a backbone and a meta-LoRA; one that somebody holds is not built anew.

    The four asked for last are held here, as far as they share the backbone of the very last; what one more takes is
    the weights that its meta-LoRA changes.

    Files and folders count as the same while names, sizes and times of change are; `Backbone`s and modules while they
    are the same object and nothing was written into their weights (what went in through `.data` is not noticed);
    `Adapter`s while their content is.

    Args:
        source: a `Backbone`, or what `Backbone.load` takes.
        meta_lora: an `Adapter`, or what `Adapter.load` takes; None for the plain backbone.

    Raises:
        TypeError: neither model nor name.
        FileNotFoundError, ValueError: see `Backbone.load`, `Adapter.load` and `Backbone.merge`.
    """
    if not isinstance(source, (nn.Module, str, PathLike)):
        raise TypeError(
            "`backbone` must be a Backbone, a timm VisionTransformer, or what `Backbone.load` takes by name or path, "
            f"got {type(source).__name__}."
        )
    if is_peft_model(meta_lora):
        meta_lora = Adapter.from_peft(meta_lora)
    if not (meta_lora is None or isinstance(meta_lora, (Adapter, str, PathLike))):
        raise TypeError(
            f"`meta_lora` must be an Adapter, a PEFT folder, a Hub id, a PEFT model or None, got "
            f"{type(meta_lora).__name__}."
        )
    key = (_backbone_key(source), _adapter_key(meta_lora))
    with _lock:
        encoder = _shared.get(key)
        if encoder is None:
            encoder = _shared[key] = _build(source, meta_lora)
        others = [other for other in _latest if other.backbone is encoder.backbone and other is not encoder]
        _latest[:] = [*others[1 - _KEPT :], encoder]
    return encoder


def forget_encoders() -> None:
    """Let go of the encoders held here, so that their memory is freed once no classifier uses them."""
    with _lock:
        _latest.clear()


def _build(source: BackboneSource, meta_lora: AdapterSource | None) -> Encoder:
    if meta_lora is None:
        backbone = source if isinstance(source, Backbone) else Backbone.load(source)
        return Encoder(source, backbone, None, backbone)
    adapter = meta_lora if isinstance(meta_lora, Adapter) else Adapter.load(meta_lora)
    plain = share_encoder(source, None)
    warn_of_doubts(plain.backbone, [adapter])
    return Encoder(source, plain.backbone, adapter, plain.backbone.merge(adapter), plain)


def _backbone_key(source: BackboneSource) -> Hashable:
    if isinstance(source, (str, PathLike)):
        return _file_key(source)
    weights = ((w.device, w.dtype, w.data_ptr(), w.is_inference() or w._version) for w in source.parameters())
    return id(source), tuple(weights)


def _adapter_key(meta_lora: AdapterSource | None) -> Hashable:
    if isinstance(meta_lora, (str, PathLike)):
        return _file_key(meta_lora)
    return None if meta_lora is None else meta_lora.digest()


def _file_key(source: str | PathLike[str]) -> Hashable:
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    if not stats:
        return str(source)  # a name
    return str(path.absolute()), tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
