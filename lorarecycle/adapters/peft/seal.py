"""The seal of a saved adapter: the metadata of its weights say which configuration and head go with them.

It covers the tensors, adapter_config.json but for where the base lies, lorarecycle.json but for names, and the head's
own file. Folders whose weights have none, such as PEFT's, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.files import hash_file, read_json
from ...runtime.settled import TornFolderError

SEAL = "seal"
"""Key in the metadata of adapter_model.safetensors."""
_FREE = ("base_model_name_or_path", "inference_mode", "revision", "name", "class_names", "lorarecycle_version")
"""Keys of the JSON files that people may change by hand."""
_MAY_BE_ABSENT = "lorarecycle.json"  # where PEFT's two files were copied alone


def make_seal(folder: Path, names: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The seal of weights that are about to be saved beside files that are there.

    Args:
        folder: holds the files.
        names: of the files.
        tensors: the weights.
    """
    return {"tensors": _digest(tensors), "files": {name: _digest_file(folder / name) for name in sorted(names)}}


def check_seal(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, skip: Collection[str]
) -> None:
    """Make sure that weights and the files beside them were saved together; weights without a seal pass.

    Args:
        path: of the weights.
        tensors, metadata: what is in it.
        skip: names of files that do not count.

    Raises:
        TornFolderError: they were not; the message names the folder and the file.
    """
    if SEAL not in metadata:
        return
    try:
        seal = json.loads(metadata[SEAL])
        expected, files = seal["tensors"], dict(seal["files"])
    except (ValueError, TypeError, KeyError):
        raise _torn(path, f"a damaged seal in {path.name}") from None
    if _digest(tensors) != expected:
        raise _torn(path, f"changed tensors in {path.name}")
    for name in sorted(files.keys() - set(skip)):
        file = path.parent / name
        if file.is_file():
            if _digest_file(file) != files[name]:
                raise _torn(path, f"another {name} than that of {path.name}")
        elif name != _MAY_BE_ABSENT:
            raise _torn(path, f"no {name}")


def _torn(path: Path, found: str) -> TornFolderError:
    return TornFolderError(
        f"the files in {path.parent} must be those that were saved together, got {found}: a save was interrupted, or a "
        "file was changed; save the adapter again."
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _digest_file(file: Path) -> str:
    if file.suffix != ".json":
        return hash_file(file)
    content = json.dumps(_without_free(read_json(file)), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _without_free(content: Any) -> Any:
    """A JSON object without the keys that people may change, in the head of lorarecycle.json too."""
    if not isinstance(content, dict):
        return content
    return {key: _without_free(value) if key == "head" else value for key, value in content.items() if key not in _FREE}
