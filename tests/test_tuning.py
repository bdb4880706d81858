"""Tuning of an adapter: learns, repeats to the bit, leaves the backbone alone."""

from pathlib import Path

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.config import TuneConfig
from lorarecycle.data.dataset import LabelledImages
from lorarecycle.tuning import tune
from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.features import extract_features

CONFIG = TuneConfig(epochs=6, batch_size=10, r=2, lr=5e-3)


def test_it_learns(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    before = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    adapter = tune(tiny_backbone, tiny_data, CONFIG, name="kinds", quiet=True)
    assert adapter.name == "kinds"
    assert adapter.base_model == "tiny"
    assert set(adapter.ranks.values()) == {2}
    assert adapter.sites == tuple(f"blocks.{i}.attn.{s}" for i in range(3) for s in "qv")
    assert adapter.head is not None
    assert adapter.head.class_names == tiny_data.class_names
    assert all(factors.lora_B.abs().max() > 0 for factors in adapter.factors.values())
    logits = adapter.head(extract_features(tiny_backbone.merge(adapter), tiny_data.images))
    assert (logits.argmax(dim=1) == tiny_data.labels).float().mean() > 0.95
    for name, value in tiny_backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_it_repeats_to_the_bit(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    config = TuneConfig(epochs=2, batch_size=10, r=2, seed=4)
    first = tune(tiny_backbone, tiny_data, config, quiet=True)
    torch.manual_seed(123)
    assert tune(tiny_backbone, tiny_data, config, quiet=True).digest() == first.digest()
    other = tune(tiny_backbone, tiny_data, TuneConfig(epochs=2, batch_size=10, r=2, seed=5), quiet=True)
    assert other.digest() != first.digest()


def test_sites_layers_and_other_image_sizes(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    config = TuneConfig(epochs=1, r=3, lora_alpha=6, sites=("proj", "fc1"), layers=(0, 2), flip=False)
    adapter = tune(tiny_backbone, tiny_data.resize(20), config, quiet=True)
    assert adapter.sites == (
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.2.attn.proj",
        "blocks.2.mlp.fc1",
    )
    assert {factors.scaling for factors in adapter.factors.values()} == {2.0}


def test_bad_data(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        tune(tiny_backbone, tiny_data.select_classes([1]), quiet=True)
    with pytest.raises(ValueError, match=r"got none of \['kind 3'\]"):
        tune(tiny_backbone, tiny_data.subset(tiny_data.labels < 3), quiet=True)
    with pytest.raises(ValueError, match="blocks"):
        tune(tiny_backbone, tiny_data, TuneConfig(layers=(7,)), quiet=True)
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        tune(tiny_backbone, tiny_data, TuneConfig(epochs=3, lr=1e30), quiet=True)


def test_the_last_checkpoints_are_kept(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    config = TuneConfig(epochs=4, batch_size=10, r=2, save_last=2)
    folder = tmp_path / "checkpoints"
    last = tune(tiny_backbone, tiny_data, config, name="kinds", checkpoints=folder, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0003", "epoch-0004"]
    third, fourth = Adapter.load(folder / "epoch-0003"), Adapter.load(folder / "epoch-0004")
    assert fourth.digest() == last.digest() != third.digest()
    assert third.name == "kinds-epoch-0003"
    shorter = tune(tiny_backbone, tiny_data, TuneConfig(epochs=3, batch_size=10, r=2), quiet=True)
    assert third.digest() == shorter.digest()  # keeping checkpoints changes nothing


def test_bad_checkpoint_settings(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`save_last` must be between 0 and 2, got 3"):
        TuneConfig(epochs=2, save_last=3)
    keeping = TuneConfig(epochs=2, save_last=1)
    with pytest.raises(ValueError, match="got None with save_last=1; give both or none"):
        tune(tiny_backbone, tiny_data, keeping, quiet=True)
    with pytest.raises(ValueError, match="give both or none"):
        tune(tiny_backbone, tiny_data, TuneConfig(epochs=2), checkpoints=tmp_path, quiet=True)
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        tune(tiny_backbone, tiny_data, keeping, checkpoints=tmp_path, quiet=True)
