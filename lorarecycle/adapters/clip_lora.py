"""Files of CLIP-LoRA: `lora_weights.pt` with the factors of CLIP's towers and how they were placed."""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..runtime.files import naming, refuse_pointer
from .base_model import BaseModel, require_base
from .value import AnyValue, LoRAFactors

_SITES = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "proj": "attn.proj"}


def read_clip_lora(file: str | PathLike[str], base: BaseModel, kind: type[AnyValue]) -> AnyValue:
    """Read such a file; see `Adapter.from_clip_lora`."""
    require_base(base)
    path = Path(file).expanduser()
    weights, facts = _content(path)
    r, alpha = (_number(facts, key, path) for key in ("r", "alpha"))
    encoder, position = facts.get("encoder", "vision"), str(facts.get("position", "all"))
    if encoder not in ("vision", "both"):
        raise ValueError(f"{path} must adapt CLIP's vision tower, got encoder={encoder!r}; tune with encoder='vision'.")
    blocks = _blocks(position, base.num_blocks)
    names = sorted(weights, key=lambda name: int(name.rpartition("_")[2]))
    if blocks is None or len(names) < len(blocks) or (encoder == "vision" and len(names) != len(blocks)):
        raise ValueError(
            f"{path} must fit {base.name!r} with {base.num_blocks} blocks, got {len(names)} layers at position "
            f"{position!r}; choose the CLIP model that it was tuned on."
        )
    factors: dict[str, LoRAFactors] = {}
    for block, name in zip(blocks, names[len(names) - len(blocks) :], strict=True):  # the text tower's come first
        for part, pair in weights[name].items():
            site = f"blocks.{block}.{_SITES.get(part, part)}"
            if part not in _SITES or not isinstance(pair, dict) or not {"w_lora_A", "w_lora_B"} <= set(pair):
                raise ValueError(f"`{name}.{part}` in {path} must be q_proj, k_proj, v_proj or proj with both factors.")
            lora_A, lora_B = pair["w_lora_A"], pair["w_lora_B"]
            expected = base.site_shape(site)
            if lora_A.ndim != 2 or lora_B.ndim != 2 or (lora_B.shape[0], lora_A.shape[1]) != expected:
                raise ValueError(
                    f"{path} must fit {base.name!r}, whose {site} is {list(expected)}, got {list(lora_A.shape)} and "
                    f"{list(lora_B.shape)}; choose the CLIP model that it was tuned on."
                )
            factors[site] = LoRAFactors(lora_A, lora_B, alpha / math.sqrt(r))
    text = len(names) - len(blocks)
    notes = (f"{text} layers of the text tower are left out; only the vision model counts",) if text else ()
    with naming(path):
        return kind(factors, None, base.name, base.mean, base.std, path.stem, notes=notes)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile and torch, many kinds
        refuse_pointer(path)
        raise ValueError(
            f"{path} must be a file of CLIP-LoRA with tensors and plain values only, got {type(error).__name__}: "
            f"{str(error)[:200]}; save it again with `torch.save`."
        ) from error
    weights, facts = (content.get(key) if isinstance(content, dict) else None for key in ("weights", "metadata"))
    if not isinstance(weights, dict) or not weights or not isinstance(facts, dict):
        raise ValueError(f"{path} must hold `weights` and `metadata` as CLIP-LoRA saves them, got another content.")
    for name, parts in weights.items():
        if not isinstance(parts, dict) or not str(name).rpartition("_")[2].isdecimal():
            raise ValueError(f"`weights` in {path} must hold layer_0, layer_1 and so on, got {str(name)[:60]!r}.")
    return weights, facts


def _number(facts: dict[str, Any], key: str, path: Path) -> float:
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise ValueError(f"`{key}` in the metadata of {path} must be a number above 0, got {str(value)[:40]}.")
    return value


def _blocks(position: str, depth: int) -> list[int] | None:
    """The blocks that a name of CLIP-LoRA's means; None for an unknown one."""
    third, half = depth // 3, depth // 2
    found = {
        "all": range(depth),
        "bottom": range(third),
        "mid": range(third, 2 * third),
        "up": range(2 * third, depth),
        "half-bottom": range(half),
        "half-up": range(half, depth),
        "top": range(depth - 1, depth),
        "top1": range(depth - 1, depth),
        "top2": range(depth - 2, depth),
        "top3": range(depth - 3, depth),
    }.get(position)
    return None if found is None else list(found)
