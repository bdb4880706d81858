"""Base models and experiment files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from good import D, normalisation
from safetensors.torch import save_file

from lorarecycle.reproduce.experiment import experiment_text
from lorarecycle.vit.backbone import Backbone


def make_base(folder: Path) -> None:
    """transformers' ViT."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": True}))


def make_timm_base(folder: Path) -> None:
    """A snapshot of a timm repository."""
    import timm

    model = timm.create_model("test_vit", num_classes=0, depth=2)
    save_file(model.state_dict(), folder / "model.safetensors")
    own = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9, "crop_mode": "center"}
    content = {
        "architecture": "test_vit",
        "num_features": 64,
        "global_pool": "token",
        "model_args": {"depth": 2},
        "pretrained_cfg": own,
    }
    (folder / "config.json").write_text(json.dumps(content))


def base_facts(found: Backbone) -> Any:
    """Weights and preparation."""
    return found.digest(), found.mean, found.std, found.fit


def base_legal(_: Path, found: Backbone) -> None:
    """Answers with finite features."""
    normalisation(found.mean, found.std)
    with torch.no_grad():
        features = found(torch.zeros(1, 3, found.image_size, found.image_size))
    assert features.shape == (1, found.embed_dim)


def make_experiment(folder: Path) -> None:
    """A table of one's own."""
    (folder / "mine.json").write_text(experiment_text("table2"))


def experiment_facts(found: Any) -> Any:
    """All cells' settings."""
    return repr([[found.cell(row, column) for row in found.rows] for column in found.columns])
