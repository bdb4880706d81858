"""Exported models prepare images as their base does: squash and crop_pct, average pooling, models that read grey."""

import json

import numpy as np
import pytest
import torch
from lorarecycle.export import FewShotSession, export_onnx
from timm.models.vision_transformer import VisionTransformer

from lorarecycle import Backbone, FewShotClassifier

pytestmark = pytest.mark.medium


def backbone(options, **preparation):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = VisionTransformer(**{**sizes, **options}).eval()
        for parameter in vit.parameters():
            parameter.data += 0.15 * torch.randn(parameter.shape)
    return Backbone(vit, name="tiny", **preparation)


@pytest.mark.parametrize(
    ("options", "preparation"),
    [
        ({}, {"resize": "squash"}),
        ({"global_pool": "avg"}, {"crop_pct": 0.8}),
        ({"in_chans": 1}, {"resize": "squash", "crop_pct": 0.9, "mean": 0.4, "std": 0.3}),
    ],
    ids=["squash", "average, crop_pct", "grey"],
)
def test_the_session_answers_as_the_classifier(options, preparation, tmp_path):
    model = backbone(options, **preparation)
    folder = export_onnx(model, tmp_path / "out").folder
    content = json.loads((folder / "config.json").read_text())
    assert (content["resize"], content["crop_pct"]) == (model.fit.resize, model.fit.crop_pct)
    generator = np.random.default_rng(0)
    images = [
        np.kron(generator.integers(0, 255, (5, 8, 3), dtype=np.uint8), np.ones((9, 9, 1), np.uint8)) for _ in "abcd"
    ]
    session, classifier = FewShotSession(folder), FewShotClassifier(model)
    ours, theirs = session.transform(images), classifier.fit_transform(images, [0, 1, 0, 1])
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    plain = backbone(options, **{**preparation, "resize": "crop", "crop_pct": 1.0})
    other = FewShotClassifier(plain).fit_transform(images, [0, 1, 0, 1])
    assert np.abs(ours - other).max() > np.abs(ours - theirs).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "pad"}, r"`resize` in .* must be 'crop' or 'squash', got 'pad'"),
        ({"crop_pct": 2}, r"`crop_pct` in .* must be from 0.1 to 1, got 2"),
        ({"crop_pct": "1"}, r"`crop_pct` in .* must be from 0.1 to 1, got '1'"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be(exported, tmp_path, changes, message):
    content = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=message):
        FewShotSession(tmp_path)


def test_descriptions_of_earlier_versions(exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((exported / "config.json").read_text())
    del content["crop_pct"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps({**content, "resize": "shorter side to image_size, then centre crop"})
    )
    assert FewShotSession(tmp_path).config["resize"] == "crop"
