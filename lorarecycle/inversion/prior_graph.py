"""A network as a graph of its batch-norm losses: each layer with its activation and residual is one operation.

`torch.fx` follows the network's `forward` down to modules without batch norm. Behind a batch-norm layer it finds what
`batch_norm_with_prior` does in the same pass: an activation, a residual added, an activation after that. Whatever does
not lead to a loss, such as the classifier, is not computed.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..kernels import batch_norm_with_prior

_MODULES: dict[Any, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Identity: "none"}
_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.relu6: "relu6"}
_SUMS = (operator.add, operator.iadd, torch.add)


def losses_graph(network: nn.Module, layers: list[nn.BatchNorm2d]) -> fx.GraphModule | None:
    """`network` as a function from images to a tuple of the prior's losses, one of each layer, in their order.

    The graph shares the network's modules. None where the network has batch-norm layers of an unknown kind, a `forward`
    that cannot be followed (values decide what it does) or does not use each layer once, or weights of its own beside
    those of its modules.

    Args:
        network: in evaluation mode.
        layers: its batch-norm layers with running statistics.
    """
    from timm.layers import BatchNormAct2d

    if any(type(layer) not in (nn.BatchNorm2d, BatchNormAct2d) for layer in layers):
        return None
    try:
        graph = _Tracer({id(layer) for layer in layers}).trace(network)
    except Exception:  # whatever a forward does with a value that is not there; the plain way takes any
        return None
    if any(node.op == "get_attr" for node in graph.nodes):
        return None  # a copy of it would not follow the network to another device
    modules: dict[str, Any] = dict(network.named_modules())
    measured = [node for node in graph.nodes if node.op == "call_module" and modules[node.target] in layers]
    if sorted(id(modules[node.target]) for node in measured) != sorted(id(layer) for layer in layers):
        return None
    places = {id(layer): i for i, layer in enumerate(layers)}
    measured.sort(key=lambda node: places[id(modules[str(node.target)])])
    return _fused(network, graph, measured, modules)


class _Tracer(fx.Tracer):
    """Enters modules that hold batch norm, and no others."""

    def __init__(self, measured: set[int]) -> None:
        super().__init__()
        self.measured = measured

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.measured or not any(id(child) in self.measured for child in m.modules())


class LayerWithLoss(nn.Module):
    """A frozen batch-norm layer with what follows it: `(act(layer(x) + residual), prior of x)`."""

    def __init__(self, layer: nn.BatchNorm2d, activation: str) -> None:
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer = self.layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return batch_norm_with_prior(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            layer.eps,
            activation=self.activation,
            residual=residual,
        )


def _fused(network: nn.Module, graph: fx.Graph, measured: list[fx.Node], modules: dict[str, Any]) -> fx.GraphModule:
    graph_module = fx.GraphModule(network, graph)
    places = {node.name: node for node in graph_module.graph.nodes}
    losses = [
        _fuse(graph_module, places[node.name], modules[str(node.target)], modules, f"measured_{index}")
        for index, node in enumerate(measured)
    ]
    (output,) = graph_module.graph.find_nodes(op="output")
    output.args = (tuple(losses),)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _fuse(graph_module: fx.GraphModule, node: fx.Node, layer: Any, modules: dict[str, Any], name: str) -> fx.Node:
    """Puts one operation in place of the layer and what it may take in; returns the node of its loss."""
    graph = graph_module.graph
    within, last = "none", node  # the last node whose value the operation gives
    beyond: nn.Module | None = None  # what a `BatchNormAct2d` does that the operation does not
    residual: fx.Node | None = None
    if type(layer) is not nn.BatchNorm2d:  # drop, then act
        if isinstance(layer.drop, nn.Identity) and type(layer.act) in _MODULES:
            within = _MODULES[type(layer.act)]
        else:
            beyond = nn.Sequential(layer.drop, layer.act)
    (x,) = node.args
    # A map that others use, too, could change in place before the operation's new place.
    if within == "none" and beyond is None and isinstance(x, fx.Node) and len(x.users) == 1:
        last = _after_identities(last, modules)
        residual = _residual(last)
        if residual is not None:
            (last,) = last.users
        acted = _after_identities(last, modules)
        following = _only_user(acted)
        found = None if following is None else _activation(following, modules)
        if following is not None and found is not None:
            within, last = found, following
    graph_module.add_submodule(name, LayerWithLoss(layer, within))
    with graph.inserting_after(last):
        call = graph.call_module(name, (x, residual))
    with graph.inserting_after(call):
        value = graph.call_function(operator.getitem, (call, 0))
        loss = graph.call_function(operator.getitem, (call, 1))
    if beyond is not None:
        graph_module.add_submodule(f"{name}_after", beyond)
        with graph.inserting_after(value):
            value = graph.call_module(f"{name}_after", (value,))
    last.replace_all_uses_with(value)
    return loss


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _after_identities(node: fx.Node, modules: dict[str, Any]) -> fx.Node:
    """The last of the identities that alone use the node in a row; the node itself where there are none."""
    while (user := _only_user(node)) is not None and _activation(user, modules) == "none":
        node = user
    return node


def _activation(node: fx.Node, modules: dict[str, Any]) -> str | None:
    if node.op == "call_module":
        return _MODULES.get(type(modules.get(str(node.target))))
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return "relu" if node.op == "call_method" and node.target in ("relu", "relu_") else None


def _residual(node: fx.Node) -> fx.Node | None:
    """What the only user of the node adds to it, or None."""
    user = _only_user(node)
    if user is None or user.op != "call_function" or user.target not in _SUMS or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    return other if isinstance(other, fx.Node) and other is not node else None
