"""A backbone on disk, for classifiers that get theirs by path."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    """A checkpoint of 2 blocks, width 32, images of 8 x 8 pixels, for a classifier that gets its backbone by path."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"
