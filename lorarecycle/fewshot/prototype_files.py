"""Class centres in a npz or safetensors file, with their labels and the hash of the model that made them; no torch."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.files import write_atomic
from ..runtime.npz import read_npz_arrays

SUFFIXES = (".npz", ".safetensors")
FORMAT_VERSION = 2


def write_prototypes(path: str | PathLike[str], prototypes: np.ndarray, classes: np.ndarray, model_hash: str) -> Path:
    """Write the file atomically.

    Args:
        path: with suffix .npz or .safetensors.
        prototypes: float32 [C, D].
        classes: [C], strings, numbers or booleans.
        model_hash: whatever tells the model that made them from every other one.

    Raises:
        ValueError: another suffix or other labels.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = _checked(path)
    labels = classes.tolist()
    if not all(isinstance(label, (str, int, float)) for label in labels):
        raise ValueError(f"labels must be strings or numbers to be saved, got {labels}; name the classes.")
    safetensors = _import_safetensors() if path.suffix == ".safetensors" else None
    dtype = "object" if classes.dtype.kind == "O" else str(classes.dtype)
    facts = json.dumps({"format_version": FORMAT_VERSION, "model": model_hash, "dtype": dtype, "classes": labels})

    def write(temporary: Path) -> None:
        if safetensors is None:
            with open(temporary, "wb") as file:
                np.savez(file, prototypes=prototypes, facts=np.array(facts))
        else:
            tensors = {"prototypes": np.ascontiguousarray(prototypes)}
            safetensors.numpy.save_file(tensors, str(temporary), metadata={"facts": facts})

    return write_atomic(path, write)


def read_prototypes(path: str | PathLike[str], model_hash: str, embed_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres and classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or made by another model.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = _checked(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prototypes {path}.")
    safetensors = _import_safetensors() if path.suffix == ".safetensors" else None
    try:
        prototypes, facts = _read(path, safetensors)
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"`format_version` {facts['format_version']!r} in place of {FORMAT_VERSION}")
        labels, dtype, model = facts["classes"], facts["dtype"], str(facts["model"])
        if prototypes.dtype != np.float32 or prototypes.ndim != 2 or len(prototypes) != len(labels):
            raise ValueError(f"{prototypes.dtype} {list(prototypes.shape)} for {len(labels)} classes")
        if not np.isfinite(prototypes).all():
            raise ValueError("NaN or infinite values")
        classes = np.array(labels, dtype=dtype)
    except Exception as error:  # each kind of damage has its own class
        raise ValueError(
            f"{path} must be a whole file of `save_prototypes`, got {type(error).__name__}: {error}; save again."
        ) from error
    if model != model_hash or prototypes.shape[1] != embed_dim:
        raise ValueError(
            f"{path} must hold the centres of this model ({model_hash[:12]}), got those of another one ({model[:12]}); "
            "call `fit` and save again."
        )
    return prototypes, classes


def _import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:  # the exported session runs without it
        raise ImportError(
            f"prototypes in a .safetensors file need safetensors ({error}); install `safetensors`, or use a .npz file."
        ) from None
    return safetensors


def _read(path: Path, safetensors: Any) -> tuple[np.ndarray, dict[str, Any]]:
    if safetensors is None:
        found = read_npz_arrays(path, ("prototypes", "facts"))
        return found["prototypes"], json.loads(str(found["facts"]))
    with safetensors.safe_open(str(path), framework="np") as file:
        return file.get_tensor("prototypes"), json.loads((file.metadata() or {})["facts"])


def _checked(path: str | PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`path` of prototypes must end in {' or '.join(SUFFIXES)}, got {path.name!r}.")
    return path
