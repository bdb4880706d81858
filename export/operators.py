"""Operators whose translation into ONNX is ours: a stable sort, and GELU in the form that ONNX Runtime fuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Translations for `torch.onnx.export`, over the exporter's own."""
    from onnxscript import opset18

    op: Any = opset18  # its types know no Python values

    def sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
        """TopK of everything: ONNX's gives equal values in the order of their indices, so it is stable."""
        length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)

    def gelu(x: Any, approximate: str = "none") -> Any:
        """The factor 0.5 comes last: that order becomes one operation when ONNX Runtime loads the file."""
        if approximate == "none":
            bell = op.Erf(op.Div(x, op.Constant(value_float=math.sqrt(2))))
        else:
            cubic = op.Mul(op.Mul(op.Mul(x, x), x), op.Constant(value_float=0.044715))
            bell = op.Tanh(op.Mul(op.Add(x, cubic), op.Constant(value_float=math.sqrt(2 / math.pi))))
        return op.Mul(op.Mul(x, op.Add(bell, op.Constant(value_float=1.0))), op.Constant(value_float=0.5))

    own: dict[Any, Callable[..., Any]] = {torch.ops.aten.sort.stable: sort}
    if opset < 20:  # later sets have an operator Gelu
        own[torch.ops.aten.gelu.default] = gelu
    return own
