"""`batch_norm_prior`: distance of a feature map's statistics from a batch-norm layer's, without copies.

With the layer itself, frozen, in the same pass (`batch_norm_with_prior`), and with what follows it, a residual and an
activation: forward reads the map once and writes the output, backward reads map and gradient once. Opaque to
`torch.compile`: Inductor's own reduction over a permuted map reads it twice.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpp, reference
from .backend import choose_backend, on_device_of
from .registration import register

ACTIVATIONS = reference.ACTIVATIONS


def _dense(x: Tensor) -> Tensor:
    """`x` itself where it is dense NCHW or channels_last, else a copy that is."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(x: Tensor, other: Tensor | None) -> Tensor | None:
    """`other` in dtype and memory format of `x`, which is dense."""
    if other is None:
        return None
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return other.to(x.dtype).contiguous(memory_format=layout)


@cache  # an import statement costs as much as a small allocation
def _triton_forward() -> ModuleType:
    from . import batch_norm_prior_triton

    return batch_norm_prior_triton


@cache
def _triton_backward() -> ModuleType:
    from . import batch_norm_prior_backward_triton

    return batch_norm_prior_backward_triton


def _plain_layer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The layer's output in float32."""
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.batch_norm(x.float(), running_mean.float(), running_var.float(), weight, bias, eps=eps)


def _plain_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    norms = torch.stack([(mean - running_mean).norm(), (var - running_var).norm()])
    y = x.new_empty(0)
    if layer:
        z = _plain_layer(x, running_mean, running_var, weight, bias, eps)
        y = reference.activate(z if residual is None else z + residual, activation).to(x.dtype)
    return y, norms.sum(), torch.cat([mean, var, norms])


def _plain_backward(
    dy: Tensor | None,
    dloss: Tensor,
    x: Tensor,
    y: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    C = x.shape[1]
    mean, var, norms = stats.split([C, C, 2])
    gaps = torch.stack([mean - running_mean, var - running_var])
    gaps = gaps * torch.where(norms == 0, 0, dloss / norms)[:, None] * (C / x.numel())
    offset, slope, mean = (v[:, None, None] for v in (gaps[0], 2 * gaps[1], mean))
    dx = offset + slope * (x - mean)
    dresidual = x.new_empty(0)
    if dy is not None:
        z = _plain_layer(x, running_mean, running_var, weight, bias, eps) if y is None else y
        dz = dy.float() if activation == "none" else torch.where(z > 0, dy.float(), 0)
        dz = torch.where(z < 6, dz, 0) if activation == "relu6" else dz
        scale = torch.rsqrt(running_var.float() + eps) * (1 if weight is None else weight.float())
        dx = dx + scale[:, None, None] * dz
        dresidual = dresidual if y is None else dz.to(x.dtype)
    return dx.to(x.dtype), dresidual


def _forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    layer: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    channels = (None if t is None else t.contiguous() for t in (running_mean, running_var, weight, bias))
    args: tuple[Any, ...] = (x, *channels, _like(x, residual), eps, activation, layer)
    if x.is_cuda or backend == "triton":
        with on_device_of(x):
            return _triton_forward().batch_norm_prior_forward(*args)
    if not cpp.available():
        return _plain_forward(*args)
    return torch.ops.lorarecycle_cpu.batch_norm_prior(*args)


def _forward_fake(x, running_mean, running_var, weight, bias, residual, eps, activation, layer, backend):
    return (
        torch.empty_like(_dense(x)) if layer else x.new_empty(0),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(2 * x.shape[1] + 2, dtype=torch.float32),
    )


def _backward(
    dy: Tensor | None,
    dloss: Tensor,
    x: Tensor,
    y: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    channels = (None if t is None else t.contiguous() for t in (running_mean, running_var, weight, bias))
    args: tuple[Any, ...] = (_like(x, dy), dloss, x, y, *channels, stats, eps, activation)
    if x.is_cuda or backend == "triton":
        with on_device_of(x):
            return _triton_backward().batch_norm_prior_backward(*args)
    if not cpp.available():
        return _plain_backward(*args)
    return torch.ops.lorarecycle_cpu.batch_norm_prior_backward(*args)


def _backward_fake(dy, dloss, x, y, running_mean, running_var, weight, bias, stats, eps, activation, backend):
    masked = dy is not None and y is not None
    return torch.empty_like(_dense(x)), torch.empty_like(_dense(x)) if masked else x.new_empty(0)


_batch_norm_prior_backward = register("batch_norm_prior_backward", _backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    x, running_mean, running_var, weight, bias, residual, ctx.eps, ctx.activation, ctx.layer, ctx.backend = inputs
    y, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    masking = y if residual is not None and ctx.activation != "none" else None  # else it follows from the map
    ctx.save_for_backward(x, masking, running_mean, running_var, weight, bias, stats)


def _gradients(ctx, dy, dloss, _):
    x, y, *channels, stats = ctx.saved_tensors
    dy = dy if ctx.layer else None
    dloss = x.new_zeros((), dtype=torch.float32) if dloss is None else dloss
    dx, dresidual = _batch_norm_prior_backward(dy, dloss, x, y, *channels, stats, ctx.eps, ctx.activation, ctx.backend)
    if dy is None or not ctx.needs_input_grad[5]:
        dresidual = None
    elif ctx.activation == "none":
        dresidual = dy
    return dx, None, None, None, None, dresidual, None, None, None, None


_batch_norm_prior = register(
    "batch_norm_prior", _forward, _forward_fake, setup_context=_setup_context, backward=_gradients
)


def _check(x: Tensor, **of_channels: Tensor | None) -> None:
    """Raise ValueError, naming argument, rule and value, where the arguments do not fit together."""
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"`x` must be [B, C, H, W] and not empty, got shape {list(x.shape)}.")
    if not x.dtype.is_floating_point:
        raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")
    channels, device = x.shape[1:2], x.device
    for name, tensor in of_channels.items():
        if tensor is None:
            continue
        if tensor.shape != channels:
            raise ValueError(f"`{name}` must be [{x.shape[1]}] to fit `x`, got shape {list(tensor.shape)}.")
        if tensor.device != device:
            raise ValueError(f"`{name}` must be on the device of `x`, {x.device}, got {tensor.device}.")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"`{name}` must have a floating-point dtype, got {tensor.dtype}.")


def _check_epilogue(x: Tensor, activation: str, residual: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(f"`residual` must have the shape of `x`, {list(x.shape)}, got {list(residual.shape)}.")
    if residual.device != x.device:
        raise ValueError(f"`residual` must be on the device of `x`, {x.device}, got {residual.device}.")
    if residual.dtype != x.dtype:
        raise ValueError(f"`residual` must have the dtype of `x`, {x.dtype}, got {residual.dtype}.")


def _frozen(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


def batch_norm_prior(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Distance of a feature map's statistics from those of a batch-norm layer (LoRA Recycle, Eq. 2).

    `||mean - running_mean||_2 + ||var - running_var||_2`, norms over the channels, not squared. The map is
    read once, in its own memory format, and its gradient written in that format. Gradients reach `x` only.

    Args:
        x: input of the layer, [B, C, H, W], NCHW or channels_last.
        running_mean: [C], frozen.
        running_var: [C], frozen; compared with the biased variance, which is what batch norm normalises with.

    Returns:
        scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or devices break the rules above.
    """
    _check(x, running_mean=running_mean, running_var=running_var)
    backend = choose_backend(x, has_cpp=True)
    if backend == "reference":
        return reference.batch_norm_prior(x, running_mean, running_var)
    channels = _frozen(running_mean), _frozen(running_var)
    return _batch_norm_prior(x, *channels, None, None, None, 0.0, "none", False, backend)[1]


def batch_norm_with_prior(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A frozen batch-norm layer together with its `batch_norm_prior`, in one pass over the map each way.

    Args:
        x: input of the layer, [B, C, H, W], NCHW or channels_last.
        running_mean, running_var: [C], frozen.
        weight, bias: [C] or None, frozen.
        eps: added to the variance.
        activation: after the layer and the residual: "none", "relu" or "relu6".
        residual: added to the layer's output, like `x`, or None.

    Returns:
        `act((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)`, in dtype and memory format of
        `x`; the prior of `x`, a scalar in float32 (float64 for float64 input). Gradients reach `x` and `residual`.

    Raises:
        ValueError: shapes, dtypes, devices or the activation break the rules above.
    """
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_epilogue(x, activation, residual)
    backend = choose_backend(x, has_cpp=True)
    channels = (
        _frozen(running_mean),
        _frozen(running_var),
        None if weight is None else _frozen(weight),
        None if bias is None else _frozen(bias),
    )
    if backend == "reference":
        return reference.batch_norm_with_prior(x, *channels, eps, activation=activation, residual=residual)
    y, loss, _ = _batch_norm_prior(x, *channels, residual, eps, activation, True, backend)
    return y, loss
