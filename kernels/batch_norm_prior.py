"""`batch_norm_prior`: distance of a feature map's statistics from a batch-norm layer's, without copies.

With the layer itself, frozen, in the same pass (`batch_norm_with_prior`): forward reads the map once and writes the
output, backward reads map and gradient once. Opaque to `torch.compile`: Inductor's own reduction over a permuted map
reads it twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpp, reference
from .backend import choose_backend, on_device_of


def _dense(x: Tensor) -> Tensor:
    """`x` itself where it is dense NCHW or channels_last, else a copy that is."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _plain_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x.float()
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    norms = torch.stack([(mean - running_mean).norm(), (var - running_var).norm()])
    y = x.new_empty(0)
    if scale is not None and shift is not None:
        y = (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    return y, norms.sum(), torch.stack([mean, var]), norms


def _plain_backward(
    dy: Tensor | None,
    dloss: Tensor,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    stats: Tensor,
    norms: Tensor,
    scale: Tensor | None,
) -> Tensor:
    running = torch.stack([running_mean, running_var])
    gaps = (stats - running) * torch.where(norms == 0, 0, dloss / norms)[:, None] * (x.shape[1] / x.numel())
    offset, slope, mean = (v[:, None, None] for v in (gaps[0], 2 * gaps[1], stats[0]))
    dx = offset + slope * (x - mean)
    if dy is not None and scale is not None:
        dx = dx + scale[:, None, None] * dy
    return dx.to(x.dtype)


@torch.library.custom_op("lorarecycle::batch_norm_prior", mutates_args=(), device_types="cuda")
def _batch_norm_prior(
    x: Tensor, running_mean: Tensor, running_var: Tensor, scale: Tensor | None, shift: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .batch_norm_prior_triton import batch_norm_prior_forward

    with on_device_of(x):
        return batch_norm_prior_forward(_dense(x), running_mean, running_var, scale, shift)


@_batch_norm_prior.register_kernel("cpu")
def _(x, running_mean, running_var, scale, shift, backend):
    if backend == "triton":
        from .batch_norm_prior_triton import batch_norm_prior_forward

        return batch_norm_prior_forward(_dense(x), running_mean, running_var, scale, shift)
    if not cpp.available():
        return _plain_forward(_dense(x), running_mean, running_var, scale, shift)
    return torch.ops.lorarecycle_cpu.batch_norm_prior(_dense(x), running_mean, running_var, scale, shift)


@_batch_norm_prior.register_fake
def _(x, running_mean, running_var, scale, shift, backend):
    return (
        x.new_empty(0) if scale is None else torch.empty_like(_dense(x)),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((2, x.shape[1]), dtype=torch.float32),
        x.new_empty(2, dtype=torch.float32),
    )


@torch.library.custom_op("lorarecycle::batch_norm_prior_backward", mutates_args=(), device_types="cuda")
def _batch_norm_prior_backward(
    dy: Tensor | None,
    dloss: Tensor,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    stats: Tensor,
    norms: Tensor,
    scale: Tensor | None,
    backend: str,
) -> Tensor:
    from .batch_norm_prior_triton import batch_norm_prior_backward

    with on_device_of(x):
        return batch_norm_prior_backward(*_laid_out(dy, x), dloss, running_mean, running_var, stats, norms, scale)


@_batch_norm_prior_backward.register_kernel("cpu")
def _(dy, dloss, x, running_mean, running_var, stats, norms, scale, backend):
    dy, x = _laid_out(dy, x)
    if backend == "triton":
        from .batch_norm_prior_triton import batch_norm_prior_backward

        return batch_norm_prior_backward(dy, x, dloss, running_mean, running_var, stats, norms, scale)
    if not cpp.available():
        return _plain_backward(dy, dloss, x, running_mean, running_var, stats, norms, scale)
    return torch.ops.lorarecycle_cpu.batch_norm_prior_backward(
        dy, dloss, x, running_mean, running_var, stats, norms, scale
    )


@_batch_norm_prior_backward.register_fake
def _(dy, dloss, x, running_mean, running_var, stats, norms, scale, backend):
    return torch.empty_like(_dense(x))


def _laid_out(dy: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both dense, the gradient in the memory format of the map."""
    x = _dense(x)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return None if dy is None else dy.contiguous(memory_format=layout), x


def _setup_context(ctx, inputs, output) -> None:
    x, running_mean, running_var, scale, _, ctx.backend = inputs
    _, _, stats, norms = output
    ctx.save_for_backward(x, running_mean, running_var, stats, norms, scale)


def _backward(ctx, dy: Tensor, dloss: Tensor, _, __):
    *saved, scale = ctx.saved_tensors
    dx = _batch_norm_prior_backward(None if scale is None else dy, dloss, *saved, scale, ctx.backend)
    return dx, None, None, None, None, None


_batch_norm_prior.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, **of_channels: Tensor | None) -> None:
    """Raise ValueError, naming argument, rule and value, where the arguments do not fit together."""
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"`x` must be [B, C, H, W] and not empty, got shape {list(x.shape)}.")
    if not x.dtype.is_floating_point:
        raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")
    for name, tensor in of_channels.items():
        if tensor is None:
            continue
        if tensor.shape != x.shape[1:2]:
            raise ValueError(f"`{name}` must be [{x.shape[1]}] to fit `x`, got shape {list(tensor.shape)}.")
        if tensor.device != x.device:
            raise ValueError(f"`{name}` must be on the device of `x`, {x.device}, got {tensor.device}.")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"`{name}` must have a floating-point dtype, got {tensor.dtype}.")


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
    running_mean, running_var = running_mean.detach().float(), running_var.detach().float()
    return _batch_norm_prior(x, running_mean, running_var, None, None, backend)[1]


def batch_norm_with_prior(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """A frozen batch-norm layer together with its `batch_norm_prior`, in one pass over the map each way.

    Args:
        x: input of the layer, [B, C, H, W], NCHW or channels_last.
        running_mean, running_var: [C], frozen.
        weight, bias: [C] or None, frozen.
        eps: added to the variance.

    Returns:
        `(x - running_mean) / sqrt(running_var + eps) * weight + bias`, in dtype and memory format of `x`; the prior, a
        scalar in float32 (float64 for float64 input). Gradients reach `x` only.

    Raises:
        ValueError: shapes, dtypes or devices break the rules above.
    """
    _check(x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    backend = choose_backend(x, has_cpp=True)
    if backend == "reference":
        return reference.batch_norm_with_prior(x, running_mean, running_var, weight, bias, eps)
    running_mean, running_var = running_mean.detach().float(), running_var.detach().float()
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight.detach().float()
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias.detach().float()
    y, loss, _, _ = _batch_norm_prior(x, running_mean, running_var, scale, shift, backend)
    return y, loss
