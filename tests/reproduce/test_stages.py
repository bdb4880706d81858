"""Stages of an experiment on anyone's data: each does its work once and keeps it."""

import pytest
import torch

from lorarecycle.reproduce import stages
from lorarecycle.runtime.files import read_json

TUNE = {"epochs": 1, "batch_size": 16}


def test_class_lists_use_every_class_before_one_comes_again():
    classes = [f"c{i}" for i in range(10)]
    lists = stages.draw_class_lists(classes, 5, 3, seed=1)
    assert [len(set(names)) for names in lists] == [3] * 5
    assert len({name for names in lists[:3] for name in names}) == 9
    assert lists == stages.draw_class_lists(classes, 5, 3, seed=1) != stages.draw_class_lists(classes, 5, 3, seed=2)
    with pytest.raises(ValueError, match="`n_way` must be at most the number of classes, 10, got 11"):
        stages.draw_class_lists(classes, 1, 11)


def test_from_images_to_a_row(tiny_backbone, make_data, tmp_path, monkeypatch):
    """Adapters, surrogates, real images in their place, a meta-LoRA, its accuracy; nothing is done twice."""
    data = make_data(n_classes=3, noise=60.0)
    adapter = stages.tuned(tiny_backbone, data, tmp_path / "adapter", config=TUNE)
    config = {"images_per_class": 4, "steps": 2, "prior": None}
    made = stages.inverted(tiny_backbone, adapter, tmp_path / "surrogate.safetensors", config=config)
    real = stages.label_by_teacher(tiny_backbone, adapter, data)
    assert torch.equal(real.images, data.images)
    assert real.teacher_logits.shape == (len(data), 3)
    assert real.scores.shape == (len(data), 16)
    settings = {"steps": 3, "n_way": 3, "n_query": 2, "guide_weight": 0.0, "interpolation": 0.0, "init": "random"}
    from_real, from_made = (
        stages.trained(tiny_backbone, [images], config=settings, adapters=[adapter]) for images in (real, made)
    )
    assert from_real.digest() != from_made.digest()

    unseen = {"other": make_data(n_classes=4, seed=5)}
    sizes = {"n_way": 3, "n_shots": (1, 2), "n_query": 3, "n_tasks": 10}
    path = tmp_path / "rows" / "row.json"
    row = stages.measured(tiny_backbone, lambda: from_real, unseen, path, **sizes)
    assert set(row) == {"seconds", "other, 1-shot", "other, 2-shot"}
    assert 30 < row["other, 2-shot"]["mean"] <= 100
    assert read_json(path) == row

    for name in ("tune", "invert", "extract_features"):
        monkeypatch.setattr(stages, name, lambda *a, **k: pytest.fail("done again"))
    assert stages.tuned(tiny_backbone, data, tmp_path / "adapter", config=TUNE).digest() == adapter.digest()
    again = stages.inverted(tiny_backbone, adapter, tmp_path / "surrogate.safetensors", config=config)
    assert torch.equal(again.images, made.images)
    assert stages.measured(tiny_backbone, lambda: pytest.fail("made again"), unseen, path, **sizes) == row


def test_real_images_need_the_head_of_their_classes(tiny_backbone, make_adapter, tiny_data):
    with pytest.raises(ValueError, match=r"must have a head over the images' classes .*, got class 0.0, class 0.1"):
        stages.label_by_teacher(tiny_backbone, make_adapter(tiny_backbone), tiny_data)
    with pytest.raises(ValueError, match="got none"):
        stages.label_by_teacher(tiny_backbone, make_adapter(tiny_backbone, head=False), tiny_data)
