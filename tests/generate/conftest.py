"""Fixtures of the generator tests: small adapters of a tiny ViT, and settings that train in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.vit.backbone import Backbone

QUICK = {"epochs": 4, "batch_size": 2, "conv_layers": 6, "latent": 8}


@pytest.fixture
def quick() -> dict[str, Any]:
    """Settings of a fit that only has to run."""
    return dict(QUICK)


@pytest.fixture
def pool(tiny_backbone: Backbone, make_adapter: Callable[..., Adapter]) -> list[Adapter]:
    """Two tasks of three checkpoints each, every one a little off its task's adapter."""
    tasks = [make_adapter(tiny_backbone, seed=seed) for seed in (1, 2)]
    return [nudge(task, i) for task in tasks for i in range(3)]


@pytest.fixture
def vectors() -> list[torch.Tensor]:
    """The task vectors of `pool`."""
    return [vector for vector in torch.randn(2, 5, generator=torch.Generator().manual_seed(0)) for _ in range(3)]


def nudge(adapter: Adapter, seed: int) -> Adapter:
    """An adapter a hundredth off."""
    generator = torch.Generator().manual_seed(seed)

    def off(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.01 * torch.randn(tensor.shape, generator=generator)

    factors = {s: f._replace(lora_A=off(f.lora_A), lora_B=off(f.lora_B)) for s, f in adapter.factors.items()}
    name = f"{adapter.name}-{seed}"
    return Adapter(factors, adapter.head, adapter.base_model, adapter.mean, adapter.std, name)
