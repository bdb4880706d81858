"""Tuning of an adapter: learns, repeats to the bit, leaves the backbone alone."""

from pathlib import Path

import pytest
import torch

from lorarecycle import tuning
from lorarecycle.adapters.adapter import Adapter
from lorarecycle.config import TuneConfig
from lorarecycle.data.dataset import LabelledImages
from lorarecycle.tuning import tune
from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.features import extract_features

CONFIG = TuneConfig(epochs=6, batch_size=10, r=2, lr=5e-3)
SHORT = {"epochs": 2, "batch_size": 10, "r": 2}


def test_it_learns(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    before = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    adapter = tune(tiny_backbone, tiny_data, config=CONFIG, name="kinds", quiet=True)
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
    first = tune(tiny_backbone, tiny_data, config=config, quiet=True)
    torch.manual_seed(123)
    assert tune(tiny_backbone, tiny_data, config=config, quiet=True).digest() == first.digest()
    other = tune(tiny_backbone, tiny_data, config=TuneConfig(epochs=2, batch_size=10, r=2, seed=5), quiet=True)
    assert other.digest() != first.digest()
    assert tune(tiny_backbone, tiny_data, config={**SHORT, "seed": 5}, quiet=True).digest() == other.digest()
    assert tune(tiny_backbone, tiny_data, config=config, seed=5, quiet=True).digest() == other.digest()
    with pytest.raises(TypeError, match="must name settings of TuneConfig .*, got rank"):
        tune(tiny_backbone, tiny_data, config={"rank": 2}, quiet=True)


def test_equal_seeds_start_from_equal_factors(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    """Whatever the data and the number of classes; with this learning rate nothing else moves."""
    still = {"epochs": 1, "lr": 1e-30}
    fewer = tune(tiny_backbone, tiny_data.select_classes([2, 0]), config=still, seed=3, quiet=True)
    for site, factors in tune(tiny_backbone, tiny_data, config=still, seed=3, quiet=True).factors.items():
        assert torch.equal(factors.lora_A, fewer.factors[site].lora_A)


def test_sites_layers_and_other_image_sizes(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    config = TuneConfig(epochs=1, r=3, lora_alpha=6, sites=("proj", "fc1"), layers=(0, 2), flip=False)
    adapter = tune(tiny_backbone, tiny_data.resize(20), config=config, quiet=True)
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
        tune(tiny_backbone, tiny_data, config=TuneConfig(layers=(7,)), quiet=True)
    with pytest.raises(FloatingPointError, match="lower `lr`"):
        tune(tiny_backbone, tiny_data, config=TuneConfig(epochs=3, lr=1e30), quiet=True)


def test_the_last_checkpoints_are_kept(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    config = TuneConfig(epochs=4, batch_size=10, r=2, save_last=2)
    folder = tmp_path / "checkpoints"
    last = tune(tiny_backbone, tiny_data, config=config, name="kinds", checkpoints=folder, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0003", "epoch-0004"]
    third, fourth = Adapter.load(folder / "epoch-0003"), Adapter.load(folder / "epoch-0004")
    assert fourth.digest() == last.digest() != third.digest()
    assert third.name == "kinds-epoch-0003"
    shorter = tune(tiny_backbone, tiny_data, config=TuneConfig(epochs=3, batch_size=10, r=2), quiet=True)
    assert third.digest() == shorter.digest()  # keeping checkpoints changes nothing


def test_bad_checkpoint_settings(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`save_last` must be between 0 and 2, got 3"):
        TuneConfig(epochs=2, save_last=3)
    keeping = TuneConfig(epochs=2, save_last=1)
    with pytest.raises(ValueError, match="got None with save_last=1; give both or none"):
        tune(tiny_backbone, tiny_data, config=keeping, quiet=True)
    with pytest.raises(ValueError, match="give both or none"):
        tune(tiny_backbone, tiny_data, config=TuneConfig(epochs=2), checkpoints=tmp_path, quiet=True)
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="must be a new or empty folder, .* with old in it; choose another"):
        tune(tiny_backbone, tiny_data, config=keeping, checkpoints=tmp_path, quiet=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`checkpoints` must be a folder, got the file"):
        tune(tiny_backbone, tiny_data, config=keeping, checkpoints=tmp_path / "file", quiet=True)


class Stopped(Exception):
    """What interrupts a tuning here."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of this step is never computed."""
    calls = 0
    original = torch.nn.functional.cross_entropy

    def loss(*args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == step + 1:
            raise Stopped
        return original(*args)

    monkeypatch.setattr(tuning.F, "cross_entropy", loss)


def test_a_stopped_tuning_goes_on_to_the_same_bits(
    tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "CHECKPOINT_EVERY", 4)
    config = {**SHORT, "epochs": 3}  # of 5 steps each
    whole = tune(tiny_backbone, tiny_data, config=config, quiet=True)
    path = tmp_path / "tuning.safetensors"
    stop_at(monkeypatch, 7)  # in the middle of an epoch, checkpoint at 4
    with pytest.raises(Stopped):
        tune(tiny_backbone, tiny_data, config=config, checkpoint=path, quiet=True)
    monkeypatch.undo()
    stop_at(monkeypatch, 11)  # so many are left
    assert tune(tiny_backbone, tiny_data, config=config, checkpoint=path, quiet=True).digest() == whole.digest()
    stop_at(monkeypatch, 0)  # done: no step is repeated
    assert tune(tiny_backbone, tiny_data, config=config, checkpoint=path, quiet=True).digest() == whole.digest()
    other = tiny_backbone.clone()
    other.vit.cls_token.data = other.vit.cls_token + 1
    turned = LabelledImages(tiny_data.images.flip(-1), tiny_data.labels, tiny_data.class_names)
    for backbone, data, settings, seed, parts in (
        (tiny_backbone, tiny_data, {**config, "lr": 0.5}, None, r"settings.lr \(0.001 there, 0.5 here\)"),
        (tiny_backbone, tiny_data, config, 1, r"seed \(0 there, 1 here\)"),
        (tiny_backbone, turned, config, None, "data"),
        (other, tiny_data, config, None, "backbone"),
    ):
        with pytest.raises(ValueError, match=f"must be of this training, got one that differs in {parts}; take"):
            tune(backbone, data, config=settings, seed=seed, checkpoint=path, quiet=True)


@pytest.mark.medium
@pytest.mark.parametrize("step", [1, 4, 6, 9, 10, 11, 13])
def test_a_stopped_tuning_that_keeps_checkpoints_goes_on(
    tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = {**SHORT, "epochs": 3, "save_last": 2}
    whole = tune(tiny_backbone, tiny_data, config=config, checkpoints=tmp_path / "whole", quiet=True)
    path, folder = tmp_path / "tuning.safetensors", tmp_path / "checkpoints"
    monkeypatch.setattr(tuning, "CHECKPOINT_EVERY", 4)
    stop_at(monkeypatch, step)
    with pytest.raises(Stopped):
        tune(tiny_backbone, tiny_data, config=config, checkpoint=path, checkpoints=folder, quiet=True)
    monkeypatch.undo()
    again = tune(tiny_backbone, tiny_data, config=config, checkpoint=path, checkpoints=folder, quiet=True)
    assert again.digest() == whole.digest()
    for name in ("epoch-0002", "epoch-0003"):
        assert Adapter.load(folder / name).digest() == Adapter.load(tmp_path / "whole" / name).digest()


def test_stopped_between_checkpoint_and_kept_adapter(
    tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**SHORT, "epochs": 3, "save_last": 2}
    path, folder = tmp_path / "tuning.safetensors", tmp_path / "checkpoints"

    def interrupted(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(Adapter, "save", interrupted)
    with pytest.raises(Stopped):
        tune(tiny_backbone, tiny_data, config=config, checkpoint=path, checkpoints=folder, quiet=True)
    assert not folder.exists()
    monkeypatch.undo()
    tune(tiny_backbone, tiny_data, config=config, checkpoint=path, checkpoints=folder, quiet=True)
    assert sorted(file.name for file in folder.iterdir()) == ["epoch-0002", "epoch-0003"]
    (folder / "epoch-0002").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"must hold the adapters of the epochs that are done, .* without epoch-0002"):
        tune(tiny_backbone, tiny_data, config=config, checkpoint=path, checkpoints=folder, quiet=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"must be a new or empty folder, .* with epoch-0003 in it"):
        tune(tiny_backbone, tiny_data, config=config, checkpoint=path, checkpoints=folder, quiet=True)
