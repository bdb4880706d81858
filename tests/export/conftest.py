"""Fixtures of the export's tests: a tiny model and its adapter, exported once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lorarecycle import Adapter, Backbone, LabelledImages
from lorarecycle.adapters.adapter import LoRAFactors

pytest.importorskip("onnxruntime", reason="the export's tests need the extra `onnx`")
pytest.importorskip("onnxscript", reason="the export's tests need the extra `onnx`")


@dataclass(frozen=True)
class Model:
    """A backbone of 2 blocks, 32 x 32 images, every weight random, and an adapter at all six kinds of site."""

    backbone: Backbone
    meta_lora: Adapter


@pytest.fixture(scope="session")
def model() -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    backbone = Backbone(vit, name="tiny", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    factors = {}
    for block in range(2):
        for site in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"):
            out, width = backbone.site_shape(f"blocks.{block}.{site}")
            lora_A, lora_B = (torch.randn(s, generator=generator) * 0.2 for s in ((2, width), (out, 2)))
            factors[f"blocks.{block}.{site}"] = LoRAFactors(lora_A, lora_B, 0.5)
    return Model(backbone, Adapter(factors, base_model="tiny", name="meta"))


@pytest.fixture(scope="session")
def pictures() -> LabelledImages:
    """Six classes of ten noisy 32 x 32 images that differ by colour and stripes."""
    generator = torch.Generator().manual_seed(1)
    stripes = 64 * torch.sin(torch.arange(32) * torch.arange(1, 7)[:, None] * 6.28 / 32)
    clean = (torch.rand(6, 3, generator=generator) * 255)[:, :, None, None] + stripes[:, None, None, :]
    labels = torch.arange(6).repeat_interleave(10)
    noisy = clean[labels] + 20 * torch.randn(60, 3, 32, 32, generator=generator)
    return LabelledImages(noisy.clamp(0, 255).to(torch.uint8), labels, tuple("abcdef"))


@pytest.fixture(scope="session")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model exported with the default settings."""
    from lorarecycle.export import export_onnx

    return export_onnx(model.backbone, tmp_path_factory.mktemp("onnx") / "fp32", model.meta_lora).folder


@pytest.fixture(scope="session")
def exported_int8(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything unlike the default: int8, uint8 input, pruned, a fixed batch, cosine."""
    from lorarecycle.export import ExportConfig, export_onnx

    config = ExportConfig(dtype="int8", uint8_input=True, prune={0: 0.5}, batch_size=4, distance="cosine")
    return export_onnx(model.backbone, tmp_path_factory.mktemp("onnx") / "int8", model.meta_lora, config).folder
