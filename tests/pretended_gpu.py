"""A GPU that is pretended: tensors stay in the CPU's memory, and every operation checks where they claim to be.

What PyTorch refuses on a GPU is refused here: operands of two devices, CPU generators for numbers on the GPU, `numpy()`
of what is there; and in a step that is to be captured as a CUDA graph whatever waits for the GPU or copies from the
host. Arithmetic, kernels and speed are not those of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lorarecycle.runtime import graphs, steps

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operations that wait for the GPU: what they give, or its shape, hangs on values."""
TAKES_BOTH = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
TAKES_BOTH |= {aten.index_put.default, aten._index_put_impl_.default}
"""Operations that copy what lies on the CPU, which a captured step may not."""


class PretendedGPU:
    """Which storages claim to lie on the GPU.

    Attributes:
        capture: operations with their numbers, of the step that is being captured; None where none is.
        steps: that were captured.
        elements: that operations on the GPU gave, to see that it was used.
    """

    def __init__(self) -> None:
        self._there: dict[int, StorageWeakRef] = {}
        self.capture: list[tuple[Any, ...]] | None = None
        self.steps = 0
        self.elements = 0

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies there."""
        return tensor.layout == torch.strided and _storage(tensor) in self._there

    def take(self, tensor: Tensor) -> Tensor:
        """Let a tensor lie there."""
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._there[storage._cdata] = StorageWeakRef(storage)  # holds the address, so that no other gets it
        return tensor

    def refuse(self, what: str) -> None:
        """Raise where a step is captured."""
        if self.capture is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class _Functions(TorchFunctionMode):
    """Devices in arguments and attributes."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, dict(kwargs or {})
        mine = bool(args) and isinstance(args[0], Tensor) and gpu.holds(args[0])
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if mine else func(*args)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return mine
        if func in (Tensor.numpy, Tensor.__array__) and mine:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.tolist and mine:
            gpu.refuse("a copy to the host")
        if func is F.one_hot and mine:  # makes its zeros where PyTorch knows the tensor to be
            if len(args) + len(kwargs) == 1:
                gpu.refuse("the largest label")
            with torch.utils._python_dispatch._disable_current_modes():
                found = func(*args, **kwargs)
            return gpu.take(found)
        if func is Tensor.__deepcopy__:
            found = func(*args, **kwargs)
            return gpu.take(found) if mine else found
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            func, args, kwargs = Tensor.to, (args[0], torch.device("cpu")), {}
        if func is Tensor.cuda:
            func, args, kwargs = Tensor.to, (args[0], GPU), {}
        asked = [one for one in (*args, *kwargs.values()) if _is_gpu(one)]
        args = [torch.device("cpu") if _is_gpu(one) else one for one in args]
        kwargs = {key: torch.device("cpu") if _is_gpu(one) else one for key, one in kwargs.items()}
        if func is Tensor.to:
            return self._moved(args, kwargs, mine, bool(asked))
        if not asked:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            gpu.refuse("a tensor of the host's numbers")
        found = func(*args, **kwargs)
        shared = any(isinstance(one, Tensor) and _storage(one) == _storage(found) for one in args)
        return gpu.take(found.clone() if shared and not mine else found)

    def _moved(self, args: list[Any], kwargs: dict[str, Any], mine: bool, to_gpu: bool) -> Tensor:
        """`Tensor.to`: a copy where the device changes."""
        gpu, source = self._gpu, args[0]
        found: Tensor = Tensor.to(*args, **kwargs)
        named = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.device | str)]
        other = next((one for one in args[1:2] if isinstance(one, Tensor)), None)
        to_gpu = gpu.holds(other) if other is not None else to_gpu or (mine and not named)
        if to_gpu == mine:
            return gpu.take(found) if mine else found
        gpu.refuse("a copy from or to the host")
        found = found.clone() if _storage(found) == _storage(source) else found
        if to_gpu:
            return gpu.take(found)
        gpu._there.pop(_storage(found), None)
        return found


class _Operations(TorchDispatchMode):
    """Devices of operands and of what they give."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = [gpu.holds(tensor) for tensor in tensors]
        if gpu.capture is not None:
            gpu.capture.append((str(func), *(leaf for leaf in leaves if isinstance(leaf, int | float | str))))
        if func is aten.lift_fresh.default:
            gpu.refuse("a tensor of the host's numbers")
        if not any(there):
            return func(*args, **kwargs)
        if func in WAITS:
            gpu.refuse(str(func))
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        written = func._schema.is_mutable and not there[0]
        pointwise = torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor
        scalars = pointwise and func not in TAKES_BOTH and not written  # may lie on the CPU
        here = [t for t, is_there in zip(tensors, there, strict=True) if not is_there and (t.dim() or not scalars)]
        if here and func not in TAKES_BOTH:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}")
        if here:
            gpu.refuse(f"a copy from or to the host, {func}")
        if func in TAKES_BOTH and not there[0] and len(tensors) > 1 and func is not aten.copy_.default:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in _indices(func, args)):
            gpu.refuse("an index by a mask")
        found = func(*args, **kwargs)
        if func is aten.copy_.default and not there[0]:
            return found

        def took(tensor: Tensor) -> Tensor:
            gpu.elements += tensor.numel()
            return gpu.take(tensor)

        return tree_map_only(Tensor, took, found)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _indices(func: Any, args: Any) -> Any:
    return args[1] if func in TAKES_BOTH and len(args) > 1 and isinstance(args[1], list | tuple) else ()


def _is_gpu(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value) in ("cuda", "cuda:0")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Everything that is moved to "cuda" is checked as if it were there. Kernels run their references; nothing is
    compiled."""
    gpu = PretendedGPU()

    def seen(step: graphs.Step) -> list[tuple[Any, ...]]:
        """What a capture of the step sees; nothing is changed."""
        gpu.capture = found = []
        try:
            graphs.unchanged(step._eager, step._state())
        finally:
            gpu.capture = None
        return found

    def captured(step: graphs.Step) -> Callable[[], Any]:
        """Runs the step as a capture would, with nothing changed, and gives it back as it is."""
        step._warm_up()  # in which libraries may allocate
        gpu.steps += 1
        first, second = seen(step), seen(step)
        other = [(one, two) for one, two in zip(first, second, strict=False) if one != two]
        if other or len(first) != len(second):
            raise RuntimeError(f"a captured step would repeat the numbers of one run: {other[:1]}")
        return step._eager

    def grouping(group: Callable[..., Any]) -> Callable[..., Any]:
        """As PyTorch's, whose keys do not ask for the device as Python does."""

        def grouped(*args: Any, **kwargs: Any) -> Any:
            found = group(*args, **kwargs)
            return {(lists[0][0].device, dtype): (lists, at) for (_, dtype), (lists, at) in found.items()}

        return grouped

    with pytest.MonkeyPatch.context() as patch, _Functions(gpu), _Operations(gpu):
        patch.setattr(graphs.Step, "_captured", captured)
        patch.setattr(steps, "_compiled", lambda function: function)
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # asks a driver
            patch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
        name = "_group_tensors_by_device_and_dtype"
        patch.setattr(torch.optim.Optimizer, name, staticmethod(grouping(getattr(torch.optim.Optimizer, name))))
        patch.setattr(clip_grad, name, grouping(getattr(clip_grad, name)))
        for name, value in {
            "is_available": True,
            "is_bf16_supported": True,
            "device_count": 0,
            "current_device": 0,
            "synchronize": None,
            "mem_get_info": (1 << 35, 1 << 36),
            "get_device_name": "pretended",
            "max_memory_allocated": 0,
            "reset_peak_memory_stats": None,
            "is_current_stream_capturing": False,
        }.items():
            patch.setattr(torch.cuda, name, lambda *a, value=value, **k: value)
        yield gpu
