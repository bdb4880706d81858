"""Registers ops so that a call costs little: around PyTorch's dispatcher where nothing but autograd has to see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(x: Tensor) -> bool:
    """Whether something records or stands in for calls on `x`: a compiler, a dispatch mode, a subclass of tensors."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or is_in_torch_dispatch_mode()


def refuse_second_derivative(name: str) -> None:
    """In the backward pass of an op that has no other.

    Raises:
        NotImplementedError: the pass itself is to be differentiated.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name} has first derivatives only; call it without `create_graph=True`.")


def register(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `lorarecycle::name`, and return what calls it at the least cost.

    Compilers and whatever else traces see one op, `torch.ops.lorarecycle.<name>`; a plain call runs `forward` itself,
    under an `autograd.Function` where a gradient is wanted. Both compute the same.

    Args:
        name: of the op.
        forward: the implementation on every device, annotated as `torch.library.custom_op` asks; arguments are given
            by position, the first is a tensor, results are new tensors.
        fake: results without values, from the same arguments.
        setup_context, backward: as `torch.library.register_autograd` takes them; none where the op has no gradient.
    """
    op = torch.library.custom_op(f"lorarecycle::{name}", forward, mutates_args=(), device_types=("cpu", "cuda"))
    op.register_fake(fake)
    if setup_context is None or backward is None:
        return lambda *args: op(*args) if is_traced(args[0]) else forward(*args)
    op.register_autograd(backward, setup_context=setup_context)
    keep, gradients = setup_context, backward

    class Direct(torch.autograd.Function):
        """With `setup_context` inside of `forward`: autograd inspects signatures on every call otherwise."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            refuse_second_derivative(name)
            return gradients(ctx, *grads)

    def call(*args: Any) -> Any:
        if is_traced(args[0]):
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return Direct.apply(*args)
        return forward(*args)

    return call
