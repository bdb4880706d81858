"""MOLE: all adapters at once, their outputs weighed at every layer by a gate that trains on the support images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.adapter import Adapter
from ...vit.backbone import Backbone
from ...vit.lora import LoRA
from .base import Given, Needs, Task
from .tuned import Optimizer, Tuned

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Gated:
    """A backbone whose linear layers add `sum_i g_i(x) D_i x`, where g is a softmax over the n adapters.

    A layer's gate looks at each token, `g = softmax(x W^T + b)`; it starts at zero, which is the adapters' average.

    Args:
        backbone: is left as it is.
        adapters: n of them.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[Adapter]) -> None:
        self.model: Backbone = backbone.clone()
        self.count: int = len(adapters)
        self.weights: nn.ParameterDict = nn.ParameterDict()
        self.biases: nn.ParameterDict = nn.ParameterDict()
        factors = [LoRA.from_adapter(adapter) for adapter in adapters]
        for i, block in enumerate(self.model.vit.blocks):
            for name in LAYERS:
                layer = block.get_submodule(name)
                parts = 3 if name == "attn.qkv" else 1
                widths = (layer.in_features, layer.out_features // parts)
                found = [lora.layer(f"blocks.{i}.{name}", widths) for lora in factors]
                if not any(found):
                    continue
                key = f"{i}_{name.replace('.', '_')}"
                self.weights[key] = torch.zeros(self.count, layer.in_features)
                self.biases[key] = torch.zeros(self.count)
                layer.register_forward_hook(partial(self._add, key, parts, _stacked(found, parts, backbone)))
        for gates in (self.weights, self.biases):
            gates.to(backbone.device)

    def parameters(self) -> list[Tensor]:
        """Of all gates."""
        return [*self.weights.values(), *self.biases.values()]

    @torch.no_grad()
    def reset(self) -> None:
        """Bring the gates back to zero."""
        for parameter in self.parameters():
            parameter.zero_()

    def _add(
        self, key: str, parts: int, factors: tuple[Tensor, Tensor, Tensor], layer: Any, args: Any, out: Any
    ) -> Tensor:
        lora_A, lora_B, owner = factors
        x = args[0]
        gate = F.linear(x.float(), self.weights[key], self.biases[key]).softmax(dim=-1).to(x)[..., owner]
        pieces = [F.linear(F.linear(x, lora_A[p]) * gate, lora_B[p]) for p in range(parts)]
        return out + torch.cat(pieces, dim=-1)


def _stacked(
    found: Sequence[tuple[Tensor, Tensor] | None], parts: int, backbone: Backbone
) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A [parts, sum of ranks, in], lora_B [parts, out, sum of ranks], and the adapter of each column."""
    there = [(i, each) for i, each in enumerate(found) if each is not None]
    lora_A = torch.cat([lora_A.detach() for _, (lora_A, _) in there], dim=1)
    lora_B = torch.cat([lora_B.detach().unflatten(0, (parts, -1)) for _, (_, lora_B) in there], dim=2)
    owner = torch.cat([torch.full((lora_A.shape[1],), i) for i, (lora_A, _) in there])
    device, dtype = backbone.device, backbone.dtype
    return lora_A.to(device, dtype), lora_B.to(device, dtype), owner.to(device)


@dataclass
class Mole(Tuned):
    """Gates and a linear classifier train on the support images; see `Tuned` for the settings.

    LoRA Recycle says no more than that a gating function composes the adapters' outputs (after Chen et al. 2024, whose
    gate sends each token to one adapter); here all adapters count, by a softmax.
    """

    optimizer: Optimizer = "adam"
    needs: ClassVar[Needs] = Needs(adapters=1, fine_tuning=True, rate=True)
    gated: Gated = field(init=False, repr=False)

    def _setup(self, given: Given) -> None:
        self.gated = Gated(given.backbone, given.adapters)

    def _solve(self, task: Task, rate: float) -> Tensor:
        self.gated.reset()
        model = self.gated.model
        return self._with_classifier(task, rate, model, model, self.gated.parameters())
