"""config.json of an exported folder: how images are prepared, and the hashes of the files. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from ..runtime.files import hash_file, read_json
from ..runtime.settled import TornFolderError

CONFIG = "config.json"
FORMAT_VERSION = 1


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and isfinite(x) for x in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (_is_size, "a size in pixels"),
    "mean": (_is_triple, "three numbers"),
    "std": (lambda value: _is_triple(value) and min(value) > 0, "three numbers above 0"),
    "input_dtype": (lambda value: value in ("float32", "uint8"), "'float32' or 'uint8'"),
    "batch_size": (lambda value: value == "dynamic" or _is_size(value), "'dynamic' or a number of images"),
    "embed_dim": (_is_size, "a width"),
    "sha256": (lambda value: isinstance(value, dict), "hashes by file name"),
}
_KEYS = (*_RULES, "distance")
_CROP = "shorter side to image_size, then centre crop"
"""What `resize` was before it could be otherwise."""


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ValueError: damaged, of a newer format, or without something that a session needs.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"`directory` must be a folder written by `python -m lorarecycle.export --onnx`, got {directory} without "
            f"{CONFIG}."
        )
    content = read_json(path)
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} must hold {', '.join(_KEYS)}, got none of {', '.join(missing)}; export again.")
    version = content.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"`format_version` in {path} must be at most {FORMAT_VERSION}, got {version!r:.80}; upgrade lorarecycle."
        )
    for key, (fits, rule) in _RULES.items():
        if not fits(content[key]):
            raise ValueError(f"`{key}` in {path} must be {rule}, got {repr(content[key])[:80]}; export again.")
    resize = content.get("resize", _CROP)
    content["resize"], content["crop_pct"] = "crop" if resize == _CROP else resize, content.get("crop_pct", 1.0)
    if content["resize"] not in ("crop", "squash"):
        raise ValueError(f"`resize` in {path} must be 'crop' or 'squash', got {repr(resize)[:80]}; export again.")
    if type(content["crop_pct"]) not in (int, float) or not 0.1 <= content["crop_pct"] <= 1:
        raise ValueError(
            f"`crop_pct` in {path} must be from 0.1 to 1, got {repr(content['crop_pct'])[:80]}; export again."
        )
    return content


def check_hash(directory: Path, name: str, content: dict[str, Any]) -> None:
    """Make sure that a file (and its external weights) is the one that was exported.

    Raises:
        FileNotFoundError: it is missing.
        TornFolderError: it is not the file that config.json describes.
    """
    for file in (name, f"{name}.data"):
        expected = content["sha256"].get(file)
        path = directory / file
        if expected is None and file != name:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; export the model again.")
        if hash_file(path) != expected:
            raise TornFolderError(
                f"{path} must be the file that {CONFIG} describes, got another content (truncated, damaged or "
                "replaced); fetch it or export the model again."
            )


def model_hash(content: dict[str, Any]) -> str:
    """SHA-256 over what decides the features of an image: the encoder, its weights, and how pixels are prepared."""
    files = [content["sha256"].get(name) for name in ("encoder.onnx", "encoder.onnx.data")]
    pixels = [content[key] for key in ("image_size", "mean", "std", "input_dtype")]
    if (content["resize"], content["crop_pct"]) != ("crop", 1):  # so that hashes from before hold
        pixels += [content["resize"], content["crop_pct"]]
    return hashlib.sha256(json.dumps([files, pixels]).encode()).hexdigest()
