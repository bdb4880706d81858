"""Training that has taken all of its steps is opened again without a step."""

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.inversion.surrogate import Surrogate
from lorarecycle.meta.train import CHECKPOINT_EVERY, meta_train


@pytest.mark.medium
@pytest.mark.parametrize("guide_weight", [0.0, 1.0])
def test_a_finished_training_gives_its_result_again(guide_weight, tiny_backbone, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(2).repeat(4)
    images = Surrogate(pixels, labels, torch.randn(8, 2, generator=generator), ("a", "b"), 8, adapter="a")
    config = {"steps": CHECKPOINT_EVERY, "n_way": 2, "n_query": 1, "interpolation": 0.0, "init": "random"}
    config |= {"guide_weight": guide_weight, "guide_size": 32}
    found: list[Adapter] = []
    for _ in range(2):
        settings = {"config": config, "checkpoint": tmp_path / "checkpoint.safetensors", "quiet": True}
        found.append(meta_train(tiny_backbone, [images], **settings).meta_lora)
    assert found[0].digest() == found[1].digest()
