"""Many frozen adapters side by side: each image of a batch wears its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from .lora import LoRA, layer_of, linear


class LoRAStack(nn.Module):
    """The factors of L adapters, stacked; pass it to `Backbone.forward(lora=..., adapter_ids=...)`.

    Ranks are padded with zeros to the largest at a layer, absent sites are zero. The factors are copied, in float32,
    and do not train.

    Args:
        adapters: for one backbone; any sites and ranks.

    Raises:
        ValueError: no adapter, or adapters of different widths.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("`adapters` must hold at least one adapter, got none.")
        self.names = tuple(adapter.name for adapter in adapters)
        self._layers: dict[str, str] = {}
        widths: dict[str, tuple[int, int]] = {}
        for adapter in adapters:
            for site, factors in adapter.factors.items():
                name, shape = layer_of(site), (factors.lora_A.shape[1], factors.lora_B.shape[0])
                if widths.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"`adapters` must fit one backbone, got (in, out) {widths[name]} and {shape} at {site} "
                        f"(adapter {adapter.name!r})."
                    )
        loras = [LoRA.from_adapter(adapter) for adapter in adapters]
        for name, shape in widths.items():
            lora_A, lora_B = _stack([lora.layer(name, shape, torch.float32) for lora in loras])
            self._layers[name] = key = name.replace(".", "_")
            self.register_buffer(f"{key}_A", lora_A)
            self.register_buffer(f"{key}_B", lora_B)

    def __len__(self) -> int:
        return len(self.names)

    def layer(self, name: str) -> tuple[Tensor, Tensor] | None:
        """`lora_A` [L, S, R, in] and `lora_B` [L, S * out, R] of one linear layer; None where no adapter has any."""
        key = self._layers.get(name)
        return None if key is None else (getattr(self, f"{key}_A"), getattr(self, f"{key}_B"))

    def worn_by(self, adapter_ids: Tensor) -> Worn:
        """What a batch wears.

        Args:
            adapter_ids: int32 or int64 [B], position of each image's adapter, -1 for none.

        Raises:
            ValueError: ids on the CPU that the stack does not have (those on a GPU are checked by the op), or no ids.
        """
        if adapter_ids.ndim != 1 or adapter_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"`adapter_ids` must be int32 or int64 [B], got {adapter_ids.dtype} {list(adapter_ids.shape)}."
            )
        if adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = adapter_ids[(adapter_ids < -1) | (adapter_ids >= len(self))].tolist()
            if wrong:
                raise ValueError(f"`adapter_ids` must be from -1 (none) to {len(self) - 1}, got {wrong[0]}.")
        return Worn(self, adapter_ids.to(next(self.buffers()).device))


class Worn(NamedTuple):
    """A stack and who wears which of its adapters; what `LoRA` is to a batch with one adapter."""

    stack: LoRAStack
    adapter_ids: Tensor

    def adapts(self, prefix: str) -> bool:
        """Whether any layer whose name starts so carries factors."""
        return any(name.startswith(prefix) for name in self.stack._layers)

    def linear(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        """A frozen linear layer plus the factors that each image wears; x [B, M, in]."""
        return linear(layer, x, self.stack.layer(name), self.adapter_ids)


def _stack(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """[L, S, R, in] and [L, N, R] from the pairs of one layer, at least one of which is not None."""
    R = max(pair[0].shape[1] for pair in pairs if pair is not None)
    first = next(pair for pair in pairs if pair is not None)
    S, _, K = first[0].shape
    lora_A = first[0].new_zeros(len(pairs), S, R, K)
    lora_B = first[1].new_zeros(len(pairs), first[1].shape[0], R)
    for i, pair in enumerate(pairs):
        if pair is not None:
            r = pair[0].shape[1]
            lora_A[i, :, :r], lora_B[i, :, :r] = pair[0].detach(), pair[1].detach()
    return lora_A, lora_B
