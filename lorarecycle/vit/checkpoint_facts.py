"""What config.json and preprocessor_config.json say of a transformers vision checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from ..runtime.files import read_json


class Facts(TypedDict, total=False):
    """Facts of a checkpoint that its tensors do not show; absent where unknown."""

    model_type: str
    layer_norm_eps: float
    hidden_act: str
    num_heads: int
    width: int
    depth: int
    patch_size: int
    image_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


DEFAULTS: dict[str, Facts] = {
    "vit": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    "deit": {
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
    "dinov2": {
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
    "clip": {
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
}
"""Per family: the defaults of transformers' configuration, and the released weights' normalisation."""

_KEYS = {
    "layer_norm_eps": ("layer_norm_eps",),
    "hidden_act": ("hidden_act",),
    "num_heads": ("num_attention_heads",),
    "width": ("hidden_size",),
    "depth": ("num_hidden_layers",),
    "patch_size": ("patch_size",),
    "image_size": ("image_size",),
}


def read_config(directory: str | PathLike[str]) -> Facts:
    """Read the facts of a checkpoint's directory; what no file says is absent.

    Args:
        directory: holds config.json (of a vision model, or of CLIP with both towers) and, maybe,
            preprocessor_config.json or processor_config.json.

    Raises:
        ValueError: a file is no JSON object.
    """
    folder = Path(directory)
    content = _read_object(folder / "config.json")
    vision: Mapping[str, Any] = content
    if isinstance(content.get("vision_config"), dict):
        vision = content["vision_config"]
    facts: dict[str, Any] = {}
    if content.get("model_type"):
        facts["model_type"] = str(content["model_type"])
    for fact, keys in _KEYS.items():
        for key in keys:
            if vision.get(key) is not None:
                facts[fact] = vision[key]
    if "num_heads" not in facts and content:
        facts["num_heads"] = 12  # the default of every family's configuration class
    if isinstance(facts.get("patch_size"), list):
        facts["patch_size"] = _one(facts["patch_size"], folder)
    if isinstance(facts.get("image_size"), list):
        facts["image_size"] = tuple(facts["image_size"])
    processor = _read_object(folder / "preprocessor_config.json")
    if not processor:
        processor = _read_object(folder / "processor_config.json").get("image_processor") or {}
    if processor.get("do_normalize", True) is False:
        facts |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    elif processor.get("image_mean") and processor.get("image_std"):
        facts |= {"mean": _triple(processor["image_mean"]), "std": _triple(processor["image_std"])}
    return facts  # type: ignore[return-value]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; fetch the file again.")
    return content


def _one(sides: list[int], folder: Path) -> int:
    if len(set(sides)) != 1:
        raise ValueError(f"`patch_size` in {folder / 'config.json'} must be square, got {sides}.")
    return sides[0]


def _triple(values: list[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
