"""What says that a safetensors file is what was written: SHA-256 of its tensors and of its other metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the exported session writes files without torch
    from torch import Tensor

KEY = "lorarecycle_sha256"
"""In the metadata: JSON of name -> hash, where "" stands for the rest of the metadata."""


def make_digests(tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> str:
    """The value of `KEY` for tensors on the CPU and the other metadata."""
    found = {name: digest_tensor(tensor) for name, tensor in sorted(tensors.items())}
    return json.dumps({"": _of_strings(strings), **found})


def check_digests(
    path: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, str], *, skip: Collection[str] = ()
) -> dict[str, str]:
    """Make sure that a file holds what was written; one without digests passes.

    Args:
        path: of the file, for messages.
        tensors: those that were read.
        strings: its metadata.
        skip: names of tensors that were not read, whose bytes are not looked at.

    Returns:
        the metadata without `KEY`.

    Raises:
        ValueError: something is missing, added or changed; the message names the file and what.
    """
    rest = {key: value for key, value in strings.items() if key != KEY}
    if KEY not in strings:
        return rest
    expected = read_digests(strings)
    if expected is None:
        raise ValueError(refusal(path, f"`{KEY}` that does not parse in its metadata"))
    strange = sorted((expected.keys() - {"", *skip}) ^ (tensors.keys() - {*skip}))
    if strange:
        raise ValueError(refusal(path, f"{strange[0][:80]!r} missing or added"))
    if expected.get("") != _of_strings(rest):
        raise ValueError(refusal(path, "other metadata"))
    for name, tensor in tensors.items():
        if expected[name] != digest_tensor(tensor):
            raise ValueError(refusal(path, f"another {name!r}"))
    return rest


def read_digests(strings: Mapping[str, str]) -> dict[str, Any] | None:
    """The digests in a file's metadata; None where they are not what was written."""
    try:
        found = json.loads(strings[KEY])
    except (KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def refusal(path: Path, found: str) -> str:
    """The message for a file that is not what was written."""
    return f"{path} must be what was written, got {found}: the file is damaged or was changed; fetch or make it again."


def hash_tensor(dtype: str, shape: Collection[int], content: Any) -> str:
    """Of a tensor's dtype ("torch.uint8"), shape and bytes."""
    sha = hashlib.sha256(f"{dtype} {list(shape)}".encode())
    sha.update(content)
    return sha.hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """`hash_tensor` of a tensor, wherever it lies."""
    import torch

    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hash_tensor(str(tensor.dtype), tensor.shape, plain.numpy().data)


def _of_strings(strings: Mapping[str, str]) -> str:
    text = json.dumps(sorted((key, value) for key, value in strings.items() if key != KEY))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
