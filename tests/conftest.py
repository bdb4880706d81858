"""Fixtures of all tests: a tiny Vision Transformer, its adapters, and images whose classes can be learnt."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported, here and in subprocesses
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torchvision does

from timm.models.vision_transformer import VisionTransformer

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.data.dataset import LabelledImages
from lorarecycle.vit.backbone import Backbone

ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the checkout on the path, where transformers would take ./kernels for Hugging Face's package
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests come first, so that no worker is alone with one at the end."""
    for mark in ("medium", "slow"):
        counts = Counter(item.path for item in items if item.get_closest_marker(mark))
        items.sort(key=lambda item: -counts[item.path])


SITES = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def build_vit() -> Callable[..., Any]:
    """Makes a ViT of 3 blocks, width 32, 16 patches, every weight random so that no part is idle."""

    def build(seed: int = 0, cls: type[VisionTransformer] = VisionTransformer, **options: Any) -> Any:
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "num_classes": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = cls(**{**sizes, **options}).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        return vit

    return build


@pytest.fixture
def tiny_vit(build_vit: Callable[..., Any]) -> Any:
    """A plain timm ViT, 32 x 32 images, patches of 8."""
    return build_vit()


@pytest.fixture
def tiny_backbone(tiny_vit: Any) -> Backbone:
    """The same as a `Backbone`."""
    return Backbone(tiny_vit, name="tiny")


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """Makes a random adapter that fits a backbone, all factors non-zero."""

    def make(
        backbone: Backbone,
        n_classes: int = 3,
        r: int | Sequence[int] = 2,
        seed: int = 0,
        sites: Sequence[str] = ("attn.q", "attn.v"),
        size: float = 0.3,
        head: bool = True,
        name: str | None = None,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        ranks = (r,) if isinstance(r, int) else tuple(r)
        factors = {}
        for block in range(backbone.num_blocks):
            for site in (f"blocks.{block}.{name}" for name in sites):
                out, width = backbone.site_shape(site)
                rank = ranks[len(factors) % len(ranks)]
                lora_A = torch.randn(rank, width, generator=generator) * size
                lora_B = torch.randn(out, rank, generator=generator) * size
                factors[site] = LoRAFactors(lora_A, lora_B, 0.5 + 0.25 * (len(factors) % 3))
        weight = torch.randn(n_classes, backbone.embed_dim, generator=generator)
        bias = torch.randn(n_classes, generator=generator)
        classes = tuple(f"class {seed}.{c}" for c in range(n_classes))
        return Adapter(
            factors,
            Head(weight, bias, classes) if head else None,
            base_model=backbone.name,
            mean=backbone.mean,
            std=backbone.std,
            name=name or f"adapter-{seed}",
        )

    return make


@pytest.fixture
def make_data() -> Callable[..., LabelledImages]:
    """Makes images whose classes differ by colour and stripes, under noise."""

    def make(
        n_classes: int = 4, per_class: int = 12, size: int = 32, seed: int = 0, noise: float = 20.0
    ) -> LabelledImages:
        generator = torch.Generator().manual_seed(seed)
        stripes = 64 * torch.sin(torch.arange(size) * torch.arange(1, n_classes + 1)[:, None] * 6.28 / size)
        colours = torch.rand(n_classes, 3, generator=generator) * 255
        clean = colours[:, :, None, None] + stripes[:, None, None, :]
        labels = torch.arange(n_classes).repeat_interleave(per_class)
        noisy = clean[labels] + noise * torch.randn(len(labels), 3, size, size, generator=generator)
        images = noisy.clamp(0, 255).to(torch.uint8)
        return LabelledImages(images, labels, tuple(f"kind {c}" for c in range(n_classes)))

    return make


@pytest.fixture
def tiny_data(make_data: Callable[..., LabelledImages]) -> LabelledImages:
    """Four classes of twelve 32 x 32 images."""
    return make_data()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data for development; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("LORARECYCLE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data absent: no folder {folder}; set LORARECYCLE_DATA")
    return folder
