"""Trainable LoRA factors, kept apart from the frozen backbone that applies them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, Head, LoRAFactors
from ..adapters.base_model import BaseModel
from ..data.images import Fit
from ..kernels import lora_qkv, reference
from ..kernels.lora_qkv import MAX_RANK

SITE_NAMES = {
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_LAYERS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), **{f"{s}": (s,) for s in SITE_NAMES.values()}}


class BlockFactors(NamedTuple):
    """The factors of a block's linear layers, None where a layer carries none; see `LoRA.layer`."""

    qkv: tuple[Tensor, Tensor] | None = None
    proj: tuple[Tensor, Tensor] | None = None
    fc1: tuple[Tensor, Tensor] | None = None
    fc2: tuple[Tensor, Tensor] | None = None


NO_FACTORS = BlockFactors()


class Sites(BaseModel, Protocol):
    """What factors ask of the model that they are for, such as a `Backbone`."""

    fit: Fit

    @property
    def device(self) -> torch.device: ...


def fresh_factors(r: int, out: int, width: int, scaling: float = 1.0, *, generator: torch.Generator) -> LoRAFactors:
    """Factors of one site as PEFT starts them: `lora_A` Kaiming uniform, `lora_B` zero.

    Args:
        r: rank.
        out, width: of the weight, [out, width].
        scaling: of the product.
        generator: randomness of `lora_A`, on the CPU.
    """
    bound = 1 / math.sqrt(width)  # kaiming_uniform with a = sqrt(5)
    lora_A = (torch.rand(r, width, generator=generator) * 2 - 1) * bound
    return LoRAFactors(lora_A, torch.zeros(out, r), scaling)


class LoRA(nn.Module):
    """LoRA factors as parameters; pass it to `Backbone.forward(lora=...)`.

    Args:
        factors: site -> `LoRAFactors`; the tensors are copied, in float32.
    """

    def __init__(self, factors: Mapping[str, LoRAFactors]) -> None:
        super().__init__()
        self.scalings: dict[str, float] = {site: f.scaling for site, f in factors.items()}
        self.lora_A: nn.ParameterDict = nn.ParameterDict(
            {_key(site): f.lora_A.detach().clone().float() for site, f in factors.items()}
        )
        self.lora_B: nn.ParameterDict = nn.ParameterDict(
            {_key(site): f.lora_B.detach().clone().float() for site, f in factors.items()}
        )

    @classmethod
    def random(
        cls,
        backbone: Sites,
        *,
        r: int = 4,
        lora_alpha: float = 4.0,
        sites: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
        generator: torch.Generator,
    ) -> LoRA:
        """Fresh factors as PEFT starts them: `lora_A` Kaiming uniform, `lora_B` zero.

        Args:
            backbone: model that they are for.
            r: rank.
            lora_alpha: scaling is `lora_alpha / r`.
            sites: any of q, k, v, proj, fc1, fc2.
            layers: block indices; all when None.
            generator: randomness of `lora_A`, on the CPU.
        """
        factors = {}
        for block in range(backbone.num_blocks) if layers is None else layers:
            for name in sites:
                site = f"blocks.{block}.{SITE_NAMES[name]}"
                factors[site] = fresh_factors(r, *backbone.site_shape(site), lora_alpha / r, generator=generator)
        return cls(factors).to(backbone.device)

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> LoRA:
        """The factors of an adapter, ready to be applied beside the frozen weights, or trained on."""
        return cls(adapter.factors)

    def factors(self) -> dict[str, LoRAFactors]:
        """Copies of the factors on the CPU, site by site."""
        return {
            site: LoRAFactors(
                self.lora_A[_key(site)].detach().cpu().clone(),
                self.lora_B[_key(site)].detach().cpu().clone(),
                s,
            )
            for site, s in self.scalings.items()
        }

    def to_adapter(self, *, name: str, like: Sites, head: Head | None = None) -> Adapter:
        """An `Adapter` that holds copies of the factors, for the model `like`."""
        return Adapter(
            self.factors(),
            head,
            base_model=like.name,
            mean=like.mean,
            std=like.std,
            name=name,
            resize=like.fit.resize,
        )

    def adapts(self, prefix: str) -> bool:
        """Whether any site whose name starts so carries factors."""
        return any(site.startswith(prefix) for site in self.scalings)

    def block(self, i: int, block: Any) -> BlockFactors:
        """What one block of a ViT applies beside its weights (see `layer`)."""
        layers = {"attn.qkv": block.attn.qkv, "attn.proj": block.attn.proj}
        if self.adapts(f"blocks.{i}.mlp."):
            layers |= {"mlp.fc1": block.mlp.fc1, "mlp.fc2": block.mlp.fc2}
        found = {
            name.split(".")[1]: self.layer(f"blocks.{i}.{name}", _widths(name, layer)) for name, layer in layers.items()
        }
        return BlockFactors(**found)

    def layer(self, name: str, widths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Stacked factors of one linear layer for `kernels.lora_qkv`.

        Args:
            name: "blocks.3.attn.qkv", "blocks.3.attn.proj", "blocks.3.mlp.fc1" or "blocks.3.mlp.fc2".
            widths: (in, out of one segment).

        Returns:
            `lora_A` [S, R, in] and `lora_B` [S * out, R], float32, scaling multiplied in, smaller ranks and absent
            sites padded with zeros; None where the layer carries no factors.
        """
        _, block, layer = name.split(".", 2)
        sites = [f"blocks.{block}.{site}" for site in _LAYERS[layer]]
        ranks = [self.lora_A[_key(s)].shape[0] if s in self.scalings else 0 for s in sites]
        R = max(ranks)
        if R == 0:
            return None
        in_features, out_features = widths
        stack_A, stack_B = [], []
        for site, r in zip(sites, ranks, strict=True):
            if r == 0:
                zeros = self.lora_A[_key(sites[ranks.index(R)])]
                stack_A.append(zeros.new_zeros(R, in_features))
                stack_B.append(zeros.new_zeros(out_features, R))
                continue
            lora_A, lora_B = self.lora_A[_key(site)], self.lora_B[_key(site)] * self.scalings[site]
            stack_A.append(nn.functional.pad(lora_A, (0, 0, 0, R - r)) if r < R else lora_A)
            stack_B.append(nn.functional.pad(lora_B, (0, R - r)) if r < R else lora_B)
        return torch.stack(stack_A), torch.cat(stack_B)


def linear(layer: nn.Linear, x: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """A frozen linear layer plus stacked factors (see `kernels.lora_qkv`), if any; x [..., in]."""
    if factors is None:
        return layer(x)
    if factors[0].shape[-2] <= MAX_RANK:
        return lora_qkv(x, layer.weight, layer.bias, *factors)
    lora_A, lora_B = (factor.to(x.dtype) for factor in factors)
    return reference.lora_qkv(x, layer.weight, layer.bias, lora_A, lora_B)


def _widths(name: str, layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features // (3 if name.endswith(".qkv") else 1)


def _key(site: str) -> str:
    return site.replace(".", "_")  # parameter names hold no dots
