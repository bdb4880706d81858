"""`cls_topk_gather`: drop the patch tokens that the class token attends to least, in two launches.

Opaque to `torch.compile`: the selection has no form that Inductor could fuse with its neighbours.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import cpp, reference
from .backend import choose_backend, on_device_of
from .registration import register

MAX_TOKENS = 4096
"""Of an image whose scores one Triton program holds in registers; for more, plain PyTorch runs."""


@cache  # an import statement costs as much as a small allocation
def _triton() -> ModuleType:
    from . import cls_topk_gather_triton

    return cls_topk_gather_triton


def _forward(q: Tensor, k: Tensor, x: Tensor, num_keep: int, num_prefix: int, backend: str) -> tuple[Tensor, Tensor]:
    if q.is_cuda or backend == "triton":
        with on_device_of(x):
            return _triton().cls_topk_gather_forward(q, k, x, num_keep, num_prefix)
    if not cpp.available():
        return reference.cls_topk_gather(q, k, x, num_keep, num_prefix)
    return torch.ops.lorarecycle_cpu.cls_topk_gather(q, k, x, num_keep, num_prefix)


def _forward_fake(q, k, x, num_keep, num_prefix, backend):
    B, _, D = x.shape
    return x.new_empty((B, num_prefix + num_keep, D)), x.new_empty((B, num_keep), dtype=torch.int64)


def _backward(dout: Tensor, index: Tensor, num_tokens: int, num_prefix: int, backend: str) -> Tensor:
    if dout.is_cuda or backend == "triton":
        with on_device_of(dout):
            return _triton().cls_topk_gather_backward(dout, index, num_tokens, num_prefix)
    if not cpp.available():
        return reference.scatter_tokens(dout, index, num_tokens, num_prefix)
    return torch.ops.lorarecycle_cpu.scatter_tokens(dout, index, num_tokens, num_prefix)


def _backward_fake(dout, index, num_tokens, num_prefix, backend):
    return dout.new_empty((dout.shape[0], num_tokens, dout.shape[2]))


_cls_topk_gather_backward = register("cls_topk_gather_backward", _backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    _, _, x, _, ctx.num_prefix, ctx.backend = inputs
    ctx.num_tokens = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradients(ctx, dout: Tensor, _):
    (index,) = ctx.saved_tensors
    dx = _cls_topk_gather_backward(dout, index, ctx.num_tokens, ctx.num_prefix, ctx.backend)
    return None, None, dx, None, None, None


_cls_topk_gather = register(
    "cls_topk_gather", _forward, _forward_fake, setup_context=_setup_context, backward=_gradients
)


def _check(q: Tensor, k: Tensor, x: Tensor, num_keep: int, num_prefix: int) -> None:
    """Raise ValueError, naming argument, rule and value, where the arguments do not fit together."""
    if q.ndim != 4:
        raise ValueError(f"`q` must be [B, H, M, d], got shape {list(q.shape)}.")
    if k.shape != q.shape:
        raise ValueError(f"`k` must have the shape of `q`, {list(q.shape)}, got {list(k.shape)}.")
    B, _, M, _ = q.shape
    if x.ndim != 3 or x.shape[:2] != (B, M):
        raise ValueError(f"`x` must be [B, M, D] with B = {B}, M = {M}, got shape {list(x.shape)}.")
    for name, tensor in {"q": q, "k": k, "x": x}.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"`{name}` must have a floating-point dtype, got {tensor.dtype}.")
    if k.dtype != q.dtype:
        raise ValueError(f"`k` must have the dtype of `q`, {q.dtype}, got {k.dtype}.")
    for name, tensor in {"q": q, "k": k}.items():
        if tensor.device != x.device:
            raise ValueError(f"`{name}` must be on the device of `x`, {x.device}, got {tensor.device}.")
    if not 1 <= num_prefix < M:
        raise ValueError(f"`num_prefix` must be from 1 (the class token) to {M - 1} for {M} tokens, got {num_prefix}.")
    if not 1 <= num_keep <= M - num_prefix:
        raise ValueError(f"`num_keep` must be from 1 to the {M - num_prefix} patch tokens there are, got {num_keep}.")


def cls_topk_gather(q: Tensor, k: Tensor, x: Tensor, num_keep: int, num_prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Drop the patch tokens that the class token attends to least (LoRA Recycle, Sec. 4.3).

    Scores are softmax(q_cls K^T / sqrt(d)) over all tokens, averaged over heads, in float32 and without
    gradient; equal scores go to the lower index. Gradients reach `x` only.

    Args:
        q: queries of the block, [B, H, M, d]; only the class token's row is read.
        k: keys of the block, [B, H, M, d].
        x: residual stream after the attention of the block, [B, M, D]; gathered as it is.
        num_keep: patch tokens kept, static.
        num_prefix: class and register tokens, always kept and never ranked.

    Returns:
        the shorter stream [B, num_prefix + num_keep, D]; the kept positions int64 [B, num_keep], ascending.

    Raises:
        ValueError: shapes, dtypes, devices, `num_keep` or `num_prefix` break the rules above.
    """
    _check(q, k, x, num_keep, num_prefix)
    backend = choose_backend(q, has_cpp=True)
    if x.numel() == 0 or backend == "reference" or (backend == "triton" and x.shape[1] > MAX_TOKENS):
        return reference.cls_topk_gather(q, k, x, num_keep, num_prefix)
    q, k = (t.detach() if t.requires_grad else t for t in (q, k))
    return _cls_topk_gather(q, k, x, num_keep, num_prefix, backend)
