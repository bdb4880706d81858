"""What config.json and preprocessor_config.json say of a transformers vision checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from ..data.processor import read_processor
from ..runtime.files import read_object


class Facts(TypedDict, total=False):
    """Facts of a checkpoint that its tensors do not show; absent where unknown."""

    model_type: str
    family: str
    layer_norm_eps: float
    hidden_act: str
    num_heads: int
    width: int
    depth: int
    patch_size: int
    image_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    crop_pct: float


_IMAGENET: Facts = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
DEFAULTS: dict[str, Facts] = {
    "vit": {
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "resize": "squash",
    },
    "deit": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", **_IMAGENET, "resize": "squash", "crop_pct": 0.875},
    "dinov2": {"layer_norm_eps": 1e-6, "hidden_act": "gelu", **_IMAGENET, "resize": "crop", "crop_pct": 0.875},
    "clip": {
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "resize": "crop",
    },
}
"""Per family: the defaults of transformers' configuration, and how images were prepared for the released weights."""

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
    facts: dict[str, Any] = dict(find_facts(_read_object(folder / "config.json"), folder / "config.json"))
    found = read_processor(folder)
    facts |= {key: value for key, value in found._asdict().items() if value is not None}
    return facts  # type: ignore[return-value]


def find_facts(content: Mapping[str, Any], path: Path) -> Facts:
    """The facts in the content of a config.json.

    Args:
        content: the JSON object.
        path: the file, for messages.

    Raises:
        ValueError: a value of the wrong kind.
    """
    vision: Mapping[str, Any] = content
    if isinstance(content.get("vision_config"), dict):
        vision = content["vision_config"]
    facts: dict[str, Any] = {}
    if content.get("model_type"):
        facts["model_type"] = str(content["model_type"])
    for fact, keys in _KEYS.items():
        for key in keys:
            if vision.get(key) is not None:
                facts[fact] = _checked(vision[key], key, path)
    if "num_heads" not in facts and content:
        facts["num_heads"] = 12  # the default of every family's configuration class
    if isinstance(facts.get("patch_size"), list):
        facts["patch_size"] = _one(facts["patch_size"], path)
    if isinstance(facts.get("image_size"), list):
        facts["image_size"] = tuple(facts["image_size"])
    return facts  # type: ignore[return-value]


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _checked(value: Any, key: str, path: Path) -> Any:
    """A number above 0 (or a list of two for a size), or the name of an activation."""
    if key == "hidden_act":
        fits, rule = isinstance(value, str), "a name"
    else:
        sides = value if key in ("image_size", "patch_size") and isinstance(value, list) else [value]
        kinds = (int, float) if key == "layer_norm_eps" else (int,)
        fits = bool(sides) and all(type(side) in kinds and 0 < side < 1e6 for side in sides)
        rule = "a number above 0"
    if not fits:
        raise ValueError(f"`{key}` in {path} must be {rule}, got {str(value)[:60]}; fetch the file again.")
    return value


def _one(sides: list[int], path: Path) -> int:
    if len(set(sides)) != 1:
        raise ValueError(f"`patch_size` in {path} must be square, got {sides}.")
    return sides[0]
