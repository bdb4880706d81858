"""Registered ops: a plain call goes around the dispatcher, whatever traces sees one op, results are the same."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import registration
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CALLS: list[str] = []


def _forward(x: Tensor, factor: float) -> Tensor:
    CALLS.append("forward")
    return x * factor


def _fake(x, factor):
    CALLS.append("fake")
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    ctx.factor = inputs[1]


def _gradients(ctx, dy):
    CALLS.append("backward")
    return dy * ctx.factor, None


scaled = registration.register("test_scaled", _forward, _fake, setup_context=_setup_context, backward=_gradients)
scaled_alone = registration.register("test_scaled_alone", _forward, _fake)


@pytest.fixture(autouse=True)
def calls() -> list[str]:
    CALLS.clear()
    return CALLS


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [scaled, torch.ops.lorarecycle.test_scaled], ids=["call", "op"])
def test_both_ways_give_value_and_gradient(form, calls):
    x = torch.arange(3.0, requires_grad=True)
    y = form(x, 2.0)
    (dx,) = torch.autograd.grad(y, x, torch.ones(3))
    assert y.tolist() == [0, 2, 4]
    assert dx.tolist() == [2, 2, 2]
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("call", [scaled, scaled_alone])
def test_no_graph_where_no_gradient_is_wanted(call):
    assert call(torch.ones(2), 2.0).grad_fn is None
    with torch.no_grad():
        assert call(torch.ones(2, requires_grad=True), 2.0).grad_fn is None


@pytest.mark.parametrize(("call", "name"), [(scaled, "test_scaled"), (scaled_alone, "test_scaled_alone")])
def test_a_dispatch_mode_sees_the_op(call, name):
    with _Seen() as seen:
        call(torch.ones(2), 2.0)
    assert f"lorarecycle.{name}.default" in seen.ops


def test_tensors_without_values_are_not_worked_on(calls):
    with FakeTensorMode() as mode:
        y = scaled(torch.empty(2), 2.0)
    assert y.fake_mode is mode
    assert calls == ["fake"]


def test_compiled_as_one_op():
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(scaled, backend=look, fullgraph=True)
    assert compiled(torch.ones(2), 2.0).tolist() == [2, 2]
    assert [target for target in seen if "lorarecycle" in target]


def test_second_derivatives_are_refused():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="test_scaled has first derivatives only"):
        torch.autograd.grad(scaled(x, 2.0).sum(), x, create_graph=True)
