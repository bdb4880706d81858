"""Task vectors: what a generator is asked with (ICM-LoRA, Sec. 3.2 and Tab. 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageInput, to_uint8
from ..runtime.files import load_tensors, save_tensors
from ..vit.backbone import Backbone
from ..vit.features import extract_features

FILE = "task_vector.safetensors"
"""Its name in a task's folder."""


def task_vector(backbone: Backbone, images: ImageInput, *, batch_size: int = 64) -> Tensor:
    """The vision task vector: the mean feature of a task's images (Eq. 1).

    Args:
        backbone: the plain model, without an adapter, so that vectors of all tasks lie in one space.
        images: anything that `lorarecycle.data.images.to_uint8` takes.
        batch_size: images per forward pass.

    Returns:
        float32 [D], on the CPU.
    """
    pixels = to_uint8(images, backbone.fit)
    with torch.no_grad():
        return extract_features(backbone, pixels, batch_size=batch_size).mean(dim=0)


def text_vector(description: str | Sequence[str], encode: Callable[[list[str]], Any]) -> Tensor:
    """The text task vector: the mean feature of one or more descriptions.

    Args:
        description: such as "Tell cats from dogs.".
        encode: any sentence encoder: list of n strings -> array [n, D]; `clip_encoder` makes one.

    Returns:
        float32 [D], on the CPU.

    Raises:
        ValueError: no description, or the encoder gave something else than one row for each.
    """
    texts = [description] if isinstance(description, str) else list(description)
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"`description` must hold some text, got {description!r}.")
    features = torch.as_tensor(encode(texts)).detach().float().cpu()
    if features.ndim != 2 or len(features) != len(texts):
        raise ValueError(f"`encode` must give one row for each of {len(texts)} texts, got {list(features.shape)}.")
    return check_vector(features.mean(dim=0))


def clip_encoder(model: str | PathLike[str]) -> Callable[[list[str]], Tensor]:
    """CLIP's text tower with its projection, as an encoder for `text_vector`.

    Args:
        model: folder of a transformers CLIP checkpoint with its tokenizer, or a Hub id.

    Raises:
        ImportError: transformers is missing.
        OSError: the checkpoint cannot be had.
    """
    try:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection
    except ImportError as error:
        raise ImportError("a text vector by CLIP needs transformers; install lorarecycle[transformers].") from error
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tower = CLIPTextModelWithProjection.from_pretrained(str(model)).eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return tower(**tokens).text_embeds

    return encode


def check_vector(vector: Any, width: int | None = None, what: str = "`task_vector`") -> Tensor:
    """Any array as a task vector, float32 [D] on the CPU.

    Raises:
        TypeError: no array of real numbers.
        ValueError: not one-dimensional, not finite, or of another width.
    """
    try:
        given = torch.as_tensor(vector)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be an array of numbers [D], got {type(vector).__name__} ({error}).") from error
    if given.is_complex():
        raise TypeError(f"{what} must hold real numbers, got {given.dtype}.")
    found = given.detach().float().cpu()
    if found.ndim != 1 or not len(found):
        raise ValueError(f"{what} must be an array [D], got shape {list(found.shape)}.")
    if not torch.isfinite(found).all():
        raise ValueError(f"{what} must be finite, got {int((~torch.isfinite(found)).sum())} NaN or infinite values.")
    if width is not None and len(found) != width:
        raise ValueError(
            f"{what} must have the width of those that the generator learnt from ({width}), got {len(found)}; make it "
            "with the same backbone or encoder."
        )
    return found


def save_vector(path: str | PathLike[str], vector: Tensor, **facts: object) -> Path:
    """Write a task vector as safetensors; `facts` go into its metadata."""
    return save_tensors(path, {"task_vector": check_vector(vector)}, facts)


def load_vector(path: str | PathLike[str]) -> Tensor:
    """Read what `save_vector` wrote, float32 [D].

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file.
    """
    tensors, _ = load_tensors(path)
    if "task_vector" not in tensors:
        raise ValueError(f"{path} must hold `task_vector`, got {sorted(tensors)}; see `lorarecycle task-vector`.")
    try:
        return check_vector(tensors["task_vector"], what=f"`task_vector` in {path}")
    except TypeError as error:
        raise ValueError(str(error)) from error
