"""`batch_norm_prior`: distance of a feature map's statistics from a batch-norm layer's, without copies.

Opaque to `torch.compile`: Inductor's own reduction over a permuted map reads it twice, this one once.
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


def _plain_forward(x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    norms = torch.stack([(mean - running_mean).norm(), (var - running_var).norm()])
    return norms.sum(), torch.stack([mean, var]), norms


def _plain_backward(
    dloss: Tensor, x: Tensor, running_mean: Tensor, running_var: Tensor, stats: Tensor, norms: Tensor
) -> Tensor:
    running = torch.stack([running_mean, running_var])
    gaps = (stats - running) * torch.where(norms == 0, 0, dloss / norms)[:, None] * (x.shape[1] / x.numel())
    offset, slope, mean = (v[:, None, None] for v in (gaps[0], 2 * gaps[1], stats[0]))
    return (offset + slope * (x - mean)).to(x.dtype)


@torch.library.custom_op("lorarecycle::batch_norm_prior", mutates_args=(), device_types="cuda")
def _batch_norm_prior(
    x: Tensor, running_mean: Tensor, running_var: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    from .batch_norm_prior_triton import batch_norm_prior_forward

    with on_device_of(x):
        return batch_norm_prior_forward(_dense(x), running_mean, running_var)


@_batch_norm_prior.register_kernel("cpu")
def _(x, running_mean, running_var, backend):
    if backend == "triton":
        from .batch_norm_prior_triton import batch_norm_prior_forward

        return batch_norm_prior_forward(_dense(x), running_mean, running_var)
    if not cpp.available():
        return _plain_forward(x, running_mean, running_var)
    return torch.ops.lorarecycle_cpu.batch_norm_prior(_dense(x), running_mean, running_var)


@_batch_norm_prior.register_fake
def _(x, running_mean, running_var, backend):
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty((2, x.shape[1]), dtype=torch.float32),
        x.new_empty(2, dtype=torch.float32),
    )


@torch.library.custom_op("lorarecycle::batch_norm_prior_backward", mutates_args=(), device_types="cuda")
def _batch_norm_prior_backward(
    dloss: Tensor,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    stats: Tensor,
    norms: Tensor,
    backend: str,
) -> Tensor:
    from .batch_norm_prior_triton import batch_norm_prior_backward

    with on_device_of(x):
        return batch_norm_prior_backward(dloss, _dense(x), running_mean, running_var, stats, norms)


@_batch_norm_prior_backward.register_kernel("cpu")
def _(dloss, x, running_mean, running_var, stats, norms, backend):
    x = _dense(x)
    if backend == "triton":
        from .batch_norm_prior_triton import batch_norm_prior_backward

        return batch_norm_prior_backward(dloss, x, running_mean, running_var, stats, norms)
    if not cpp.available():
        return _plain_backward(dloss, x, running_mean, running_var, stats, norms)
    return torch.ops.lorarecycle_cpu.batch_norm_prior_backward(dloss, x, running_mean, running_var, stats, norms)


@_batch_norm_prior_backward.register_fake
def _(dloss, x, running_mean, running_var, stats, norms, backend):
    return torch.empty_like(_dense(x))


def _setup_context(ctx, inputs, output) -> None:
    x, running_mean, running_var, ctx.backend = inputs
    _, stats, norms = output
    ctx.save_for_backward(x, running_mean, running_var, stats, norms)


def _backward(ctx, dloss: Tensor, _, __):
    return _batch_norm_prior_backward(dloss, *ctx.saved_tensors, ctx.backend), None, None, None


_batch_norm_prior.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Raise ValueError, naming argument, rule and value, where the arguments do not fit together."""
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"`x` must be [B, C, H, W] and not empty, got shape {list(x.shape)}.")
    if not x.dtype.is_floating_point:
        raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")
    for name, tensor in {"running_mean": running_mean, "running_var": running_var}.items():
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
    _check(x, running_mean, running_var)
    backend = choose_backend(x, has_cpp=True)
    if backend == "reference":
        return reference.batch_norm_prior(x, running_mean, running_var)
    running_mean, running_var = running_mean.detach().float(), running_var.detach().float()
    return _batch_norm_prior(x, running_mean, running_var, backend)[0]
