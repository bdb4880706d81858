"""ONNX Runtime: which providers, how many threads, outputs that stay on the device. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .optional import explain_missing

PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider")
"""In the order in which they are tried."""
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""TF32 is ONNX Runtime's default on a GPU and further off than float32's tolerance."""
_DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}


class Graph:
    """One ONNX file, ready to run.

    Args:
        path: the file.
        providers: names to try in this order, of which the first must load; those of `PROVIDERS` that are there and
            load when None.
        threads: threads within an operation; when None, the environment's `OMP_NUM_THREADS` as in PyTorch, else one per
            core.

    Raises:
        ImportError: onnxruntime is missing; the message names the extra.
        FileNotFoundError: no such file.
        ValueError: a corrupt or truncated file, a provider that is unknown or does not load, fewer threads than one.
    """

    def __init__(self, path: Path, *, providers: Sequence[str] | None = None, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        if threads is not None and threads < 1:
            raise ValueError(f"`threads` must be at least 1, got {threads}; leave it out for one per core.")
        chosen = _choose(ort, providers)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; export the model again.")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or _threads_of_environment()
        try:
            with_options = [(name, _OPTIONS[name]) if name in _OPTIONS else name for name in chosen]
            self.session: Any = ort.InferenceSession(str(path), options, providers=with_options)
        except Exception as error:  # each kind of damage has its own class in onnxruntime
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path} must be a whole ONNX file, got one that does not load ({reason}).") from error
        first = self.session.get_providers()[0]
        if providers is not None and first != chosen[0]:
            raise ValueError(
                f"`providers` must begin with one that loads here, got {chosen[0]}, in whose place {first} would run; "
                "install the libraries that it needs, or leave it out."
            )
        self.path = path
        self.on_gpu: bool = first in PROVIDERS[:2]
        self.inputs: dict[Any, Any] = {node.name: node for node in self.session.get_inputs()}
        self.outputs: list[Any] = [node.name for node in self.session.get_outputs()]
        self._to_value = ort.OrtValue.ortvalue_from_numpy

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as OrtValues: on the GPU they stay there, for the next graph or for `.numpy()`.

        Args:
            feeds: numpy arrays (checked against the graph's shapes and dtypes), or OrtValues of an earlier run.

        Raises:
            ValueError: an array of another shape or dtype, a NaN pixel.
        """
        device = "cuda" if self.on_gpu else "cpu"
        binding = self.session.io_binding()
        kept = []  # the binding holds addresses only
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(self._checked(name, value))
                value = self._to_value(value, device, 0)
            kept.append(value)
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, device, 0)
        self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        if name not in self.inputs:
            raise ValueError(
                f"{self.path} must have an input `{name}`, got {list(self.inputs)}; export the model again."
            )
        node = self.inputs[name]
        wanted = np.dtype(_DTYPES[node.type])
        fits = len(node.shape) == array.ndim and all(
            isinstance(want, str) or want is None or want == have
            for want, have in zip(node.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != wanted:
            raise ValueError(
                f"`{name}` must be {wanted} {list(node.shape)}, got {array.dtype} {list(array.shape)}; "
                "prepare images as config.json says."
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"`{name}` must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite values.")
        return array


def import_onnxruntime() -> Any:
    """The module.

    Raises:
        ImportError: it is missing; the message names the extra.
    """
    fix = (
        "install `lorarecycle[onnx]` for the CPU or `lorarecycle[onnx-gpu]` for CUDA, not both (with "
        "`--force-reinstall` after removing one of two)."
    )
    with explain_missing("`lorarecycle.export` needs onnxruntime", fix):
        import onnxruntime

        if not hasattr(onnxruntime, "InferenceSession"):  # both extras were installed, one was removed
            raise ImportError("its folder is there without its files")
    return onnxruntime


def _threads_of_environment() -> int:
    """`OMP_NUM_THREADS` (the first of a list), which ONNX Runtime itself does not read; 0, its choice, if no number."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(wanted) if wanted.isdecimal() else 0


def _choose(ort: Any, providers: Sequence[str] | None) -> list[str]:
    available = ort.get_available_providers()
    chosen = [name for name in PROVIDERS if name in available] if providers is None else list(providers)
    if not chosen or any(name not in available for name in chosen):
        raise ValueError(
            f"`providers` must be some of {available}, got {chosen}; CUDA comes with `lorarecycle[onnx-gpu]`."
        )
    if "CUDAExecutionProvider" in chosen and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from PyTorch's or NVIDIA's packages
    return chosen
