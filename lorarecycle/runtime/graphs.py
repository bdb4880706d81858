"""One step, one launch: a step over static buffers, captured as a CUDA graph on a GPU and called as it is elsewhere."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

logger: logging.Logger = logging.getLogger(__name__)

Graphs = bool | None
"""Whether steps are replayed as CUDA graphs: None for where they run on a GPU."""

WARM_UPS = 3
"""Runs before capture, in which libraries allocate what they keep and kernels are compiled and tuned."""

_capturing = threading.Lock()


class Step:
    """A step that is called many times over the same tensors.

    The step reads and writes tensors that stay where they are: parameters, an optimiser's state, counters, tables of
    what was drawn beforehand. On a GPU the first call captures it as a CUDA graph, after runs whose traces in `state`
    are undone; each call then is one launch. Where capturing fails the step is called as it is, and a line of the log
    says why.

    Args:
        run: the step, without arguments; it neither synchronises nor makes tensors of Python numbers.
        state: all tensors that the step changes and that are there after it; asked for at the first call.
        device: where it runs.
        graphs: False calls the step as it is on a GPU too.
    """

    def __init__(
        self, run: Callable[[], Any], state: Callable[[], Iterable[Tensor]], device: torch.device, graphs: Graphs = None
    ) -> None:
        self._eager, self._state, self._device = run, state, device
        self._replay = None if graphs is not False and device.type == "cuda" else run

    def __call__(self) -> None:
        """Take the step."""
        if self._replay is None:
            self._replay = self._captured()
        self._replay()

    def _captured(self) -> Callable[[], Any]:
        device = self._device
        side = torch.cuda.Stream(device)  # of this device, where PyTorch's own is of the first one that captured
        own = torch.cuda.current_stream(device)
        with _capturing, torch.cuda.device(device), torch.cuda.stream(own):  # a failed capture leaves the side current
            try:
                side.wait_stream(own)
                with torch.cuda.stream(side):
                    self._warm_up()
                own.wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # other threads may work
                    self._eager()
            except RuntimeError as error:
                torch.cuda.synchronize(device)
                reason = str(error).split("\n")[0]
                logger.warning("steps run without a CUDA graph, which could not be captured: %s", reason)
                return self._eager
        return graph.replay

    def _warm_up(self) -> None:
        """Each run finds the state as it was: a run beyond the last step would read beyond the end of a table."""
        for _ in range(WARM_UPS):
            unchanged(self._eager, self._state())


def held_weakly(method: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A bound method with its arguments, which does not keep its object alive.

    An object that holds a `Step` of its own methods is freed with the last reference to it, and with it the memory of
    its graph. It must be alive when the step is taken: a graph reads and writes its tensors.
    """
    held = weakref.WeakMethod(method)

    def call() -> Any:
        alive = held()
        if alive is None:
            raise RuntimeError("a step was taken whose object is gone.")
        return alive(*args)

    return call


def unchanged(run: Callable[[], Any], state: Iterable[Tensor]) -> None:
    """Call `run`, then put back what these tensors held, without moving them, even where it raises."""
    tensors = list(state)
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        run()
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def adam(parameters: Iterable[Tensor], device: torch.device, **settings: Any) -> torch.optim.Adam:
    """Adam whose state is there from the start and whose learning rate is a tensor: what a captured step needs.

    Args:
        parameters: leaves that want gradients, on `device`.
        device: on a GPU one fused kernel takes the step, and counts steps there.
        settings: of `torch.optim.Adam`, without `lr`, see `set_rate`.
    """
    found = list(parameters)
    cuda = device.type == "cuda"
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.Adam(found, lr=rate, fused=cuda or None, capturable=cuda, **settings)
    for parameter in found:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # of length zero: it makes the state
    reset(optimizer)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: Tensor) -> None:
    """Give an optimiser of `adam` a learning rate, a scalar on its device: nothing is copied from the host."""
    optimizer.param_groups[0]["lr"].copy_(rate)


def reset(optimizer: torch.optim.Optimizer) -> None:
    """An optimiser as it was before its first step, in the same tensors; gradients are dropped."""
    for tensor in state_of(optimizer):
        tensor.zero_()
    optimizer.zero_grad(set_to_none=True)


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors in which an optimiser remembers, without the parameters, in an order that loading does not change."""
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    return [state[key] for state in states for key in sorted(state) if isinstance(state[key], Tensor)]
