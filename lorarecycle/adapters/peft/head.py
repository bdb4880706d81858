"""The classification head of a PEFT adapter: inside its file, beside it, or given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.files import load_tensors, read_object
from ..value import Head, LoRAFactors
from .config import AdapterConfig
from .keys import FoundKeys
from .metadata import Metadata
from .names import find_layer

HEAD_FILES = ("head.safetensors", "classifier.safetensors")


def find_head(
    folder: Path,
    keys: FoundKeys,
    config: AdapterConfig,
    metadata: Metadata,
    width: int,
    *,
    head: Head | str | PathLike[str] | None = None,
) -> Head | None:
    """The head that goes with an adapter; None when there is none.

    `head=` comes first, then `modules_to_save`, then a file beside the adapter. Its pool is what lorarecycle.json says,
    else "token+mean" for 2 * width features, "mean" for transformers' CLIP classifier, "pooled" (whatever the base
    pools) for timm's head and "token" otherwise. Class names come from lorarecycle.json, else from `id2label` in a
    config.json.

    Raises:
        FileNotFoundError: `head=` names no file.
        ValueError: shapes that do not fit the adapter, or several heads.
    """
    if isinstance(head, Head):
        _require_width(head, width, "`head`")
        return head
    if head is not None:
        return _head_of_file(Path(head).expanduser(), width, metadata, folder)
    if len(keys.heads) > 1:
        raise ValueError(
            f"{keys.path} must hold one head, got {sorted(keys.heads)}; choose one and give it as `head=`."
        )
    for tensors in keys.heads.values():
        if "weight" not in tensors:
            raise ValueError(f"{keys.path} must hold the weight of its head, got its bias only; give `head=`.")
        stacks = {layer.stack for layer in map(find_layer, keys.pairs) if layer}
        mean = "encoder.layers" in stacks and config.model_class in ("", "CLIPForImageClassification")
        pool = metadata.head.get("pool") or ("mean" if mean else "pooled" if "blocks" in stacks else None)
        return _make_head(tensors, pool, _class_names(metadata, folder), width, f"the head in {keys.path}")
    for name in dict.fromkeys((metadata.head_file, *HEAD_FILES)):
        if name and (folder / name).is_file():
            return _head_of_file(folder / name, width, metadata, folder)
    return None


@dataclass(frozen=True)
class PlacedHead:
    """Where a head goes on saving: inside adapter_model.safetensors, beside it, or nowhere."""

    inside: Mapping[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    beside_file: str | None = None
    beside_metadata: Mapping[str, object] = field(default_factory=dict)


def place_head(head: Head | None, layout: str, width: int) -> PlacedHead:
    """Place a head where the layout's image classifier has it, else beside the adapter.

    A head on the class token fits DINOv2's classifier (class token beside the mean patch token) with zeros
    for the second half.

    Raises:
        ValueError: a head of another width than the adapter's.
    """
    if head is None:
        return PlacedHead()
    _require_width(head, width, "the head of the adapter")
    assert head.bias is not None
    weight = head.weight
    layout = layout.removesuffix("-classifier")
    native = {"dinov2": "token+mean", "dinov2_with_registers": "token+mean", "clip_vision_model": "mean"}
    own = (native.get(layout, "token"),) if layout != "timm" else ("token", "avg", "map", "pooled")
    if layout != "clip" and head.pool in own:
        return PlacedHead({"weight": weight, "bias": head.bias})
    if native.get(layout) == "token+mean" and head.pool == "token":
        return PlacedHead({"weight": torch.cat([weight, torch.zeros_like(weight)], dim=1), "bias": head.bias})
    tensors = {"weight": weight, "bias": head.bias}
    return PlacedHead({}, tensors, HEAD_FILES[0], {"pool": head.pool, "class_names": list(head.class_names)})


def model_width(factors: Mapping[str, LoRAFactors]) -> int:
    """Width of the model: what q, k, v, proj and fc1 read and what fc2 writes."""
    site, pair = next(iter(factors.items()))
    return pair.lora_B.shape[0] if site.endswith("mlp.fc2") else pair.lora_A.shape[1]


def _head_of_file(path: Path, width: int, metadata: Metadata, folder: Path) -> Head:
    if not path.is_file():
        raise FileNotFoundError(f"`head` must be a safetensors file with weight and bias, got {path}: no such file.")
    if path.suffix != ".safetensors":
        raise ValueError(f"`head` must be a safetensors file with weight and bias, got {path}; save it as one.")
    found, notes = load_tensors(path)
    tensors: dict[str, Tensor] = {}
    for key, tensor in found.items():
        short = key.rpartition(".")[2]
        if short not in ("weight", "bias") or short in tensors:
            raise ValueError(
                f"{path} must hold `weight` [C, features] and `bias` [C] of one head, got {sorted(found)}."
            )
        tensors[short] = tensor
    if "weight" not in tensors:
        raise ValueError(f"{path} must hold `weight` [C, features] and `bias` [C], got {sorted(found)}.")
    pool = notes.get("pool", "").strip('"') or metadata.head.get("pool")
    names = _class_names(metadata, folder)
    if "class_names" in notes:
        names = _noted_names(notes["class_names"], path)
    return _make_head(tensors, pool, names, width, f"the head in {path}")


def _make_head(tensors: Mapping[str, Tensor], pool: str | None, names: tuple[str, ...], width: int, what: str) -> Head:
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.ndim == 2 and weight.shape[1] == 2 * width:
        if pool == "token" and not weight[:, width:].any():
            weight = weight[:, :width]  # the zeros that saving for DINOv2 added
        else:
            pool = "token+mean"
    elif pool == "token+mean":
        pool = None
    if weight.ndim and len(names) != len(weight):
        names = ()
    try:
        head = Head(weight, bias, names, pool or "token")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    _require_width(head, width, what)
    return head


def _require_width(head: Head, width: int, what: str) -> None:
    features = 2 * width if head.pool == "token+mean" else width
    if head.weight.shape[1] != features:
        raise ValueError(
            f"{what} must read {features} features (model width {width}, pool {head.pool!r}), got a weight "
            f"of {list(head.weight.shape)}; give the head that was tuned with this adapter."
        )


def _class_names(metadata: Metadata, folder: Path) -> tuple[str, ...]:
    names = metadata.head.get("class_names")
    if isinstance(names, list):
        return tuple(map(str, names))
    path = folder / "config.json"
    labels = read_object(path).get("id2label") if path.is_file() else None
    if not isinstance(labels, dict):
        return ()
    try:
        return tuple(str(labels[key]) for key in sorted(labels, key=int))
    except ValueError:
        return ()


def _noted_names(text: str, path: Path) -> tuple[str, ...]:
    """The class names in a file's metadata.

    Raises:
        ValueError: no JSON list.
    """
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list):
        raise ValueError(f"`class_names` in the metadata of {path} must be a JSON list, got {text[:60]!r}.")
    return tuple(map(str, names))
