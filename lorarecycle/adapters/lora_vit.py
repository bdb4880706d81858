"""Files of LoRA-ViT and of LoRA Recycle's published code: `w_a_000`, `w_b_000` and so on in one safetensors file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import load_tensors, naming
from .base_model import BaseModel, require_base
from .value import AnyValue, Head, LoRAFactors

_FACTOR = re.compile(r"w_(?P<side>[ab])_(?P<number>\d{1,6})")
_HEAD = re.compile(r"fc_\d+in_\d+out|fc\.weight")
_KINDS = {
    1: ("attn.qkv",),
    2: ("attn.q", "attn.v"),
    3: ("attn.q", "attn.k", "attn.v"),
    4: ("attn.q", "attn.k", "attn.v", "attn.proj"),
    6: ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"),
}
"""Pairs of a block -> the layers that they adapt, in the order of the model; LoRA-ViT itself adapts q and v."""


def is_lora_vit(path: Path) -> bool:
    """Whether a safetensors file holds factors under these names; False for what is no such file."""
    try:
        return any(_FACTOR.fullmatch(key) for key in load_tensors(path)[0])
    except (OSError, ValueError):
        return False


def read_lora_vit(
    file: str | PathLike[str],
    base: BaseModel,
    kind: type[AnyValue],
    *,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    scaling: float = 1.0,
    head: Head | None = None,
    class_names: Sequence[str] = (),
) -> AnyValue:
    """Read such a file; see `Adapter.from_lora_vit`."""
    require_base(base)
    path = Path(file).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"`file` must be a safetensors file, got {path}; save its tensors with safetensors.")
    tensors = load_tensors(path)[0]
    sides: dict[str, dict[int, Tensor]] = {"a": {}, "b": {}}
    others, weights = [], []
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match:
            sides[match["side"]][int(match["number"])] = tensor
        elif _HEAD.fullmatch(key):
            weights.append(tensor)
        else:
            others.append(key)
    if not sides["a"] or len(sides["a"]) != len(sides["b"]):
        raise ValueError(
            f"{path} must hold as many `w_a_...` [r, in] as `w_b_...` [out, r], got {len(sides['a'])} and "
            f"{len(sides['b'])} among {sorted(tensors)[:3]}; save it again."
        )
    pairs = [tuple(sides[side][number] for number in sorted(sides[side])) for side in "ab"]
    blocks = list(range(base.num_blocks) if layers is None else layers)
    count, rest = divmod(len(pairs[0]), len(blocks) or 1)
    chosen = tuple(_site(name) for name in sites) if sites is not None else _KINDS.get(count)
    if not blocks or chosen is None or (sites is not None and len(sites) != count) or rest > 1:
        raise ValueError(
            f"{path} must hold 1, 2, 3, 4 or 6 pairs for each of {len(blocks)} blocks of {base.name!r} (and at most "
            f"one for the head), got {len(pairs[0])}; choose the base that it was tuned on, or give `sites` (of "
            "q, k, v, proj, fc1, fc2) and `layers`."
        )
    factors: dict[str, LoRAFactors] = {}
    for block_at, block in enumerate(blocks):
        for at, layer in enumerate(chosen):
            index = block_at * count + at
            lora_A, lora_B = pairs[0][index], pairs[1][index]
            for site, part in _parts(layer, lora_B, path):
                name = f"blocks.{block}.{site}"
                _require_shape(name, lora_A, part, base, path)
                factors[name] = LoRAFactors(lora_A, part, scaling)
    notes = []
    if rest:
        notes.append("LoRA on the classifier is left out: its own weight is not in the file; give the head as `head=`")
    if others:
        notes.append(f"left out: {len(others)} other tensors ({', '.join(sorted(others)[:3])})")
    if head is None and len(weights) == 1 and weights[0].ndim == 2 and not rest:
        width = factors[next(iter(factors))].lora_A.shape[1]
        if weights[0].shape[1] == width:
            with naming(path):
                head = Head(weights[0], None, tuple(class_names), "pooled")
        else:
            notes.append(f"the head is left out: it reads {weights[0].shape[1]} features, the model has {width}")
    with naming(path):
        return kind(factors, head, base.name, base.mean, base.std, path.stem, notes=tuple(notes))


def _parts(layer: str, lora_B: Tensor, path: Path) -> list[tuple[str, Tensor]]:
    if layer != "attn.qkv":
        return [(layer, lora_B)]
    if lora_B.ndim != 2 or len(lora_B) % 3:
        raise ValueError(f"{path} must hold qkv factors with rows divisible by 3, got {list(lora_B.shape)}.")
    return list(zip(("attn.q", "attn.k", "attn.v"), torch.chunk(lora_B, 3), strict=True))


def _require_shape(site: str, lora_A: Tensor, lora_B: Tensor, base: BaseModel, path: Path) -> None:
    expected = base.site_shape(site)
    found: Any = (lora_B.shape[0], lora_A.shape[-1]) if lora_A.ndim == lora_B.ndim == 2 else "others"
    if found != expected or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"{path} must fit {base.name!r}, whose {site} is {list(expected)}, got factors {list(lora_A.shape)} and "
            f"{list(lora_B.shape)} there; choose the base that it was tuned on, or give `sites` in their order."
        )


def _site(name: str) -> str:
    known = {
        **{key: f"attn.{key}" for key in ("q", "k", "v", "proj", "qkv")},
        **{key: f"mlp.{key}" for key in ("fc1", "fc2")},
    }
    if name not in known:
        raise ValueError(f"`sites` must be of {', '.join(known)}, got {name!r}.")
    return known[name]
