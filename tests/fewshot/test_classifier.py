"""FewShotClassifier: labels, images and manners of scikit-learn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sklearn.exceptions
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.data.dataset import LabelledImages
from lorarecycle.fewshot import labels
from lorarecycle.fewshot.classifier import FewShotClassifier, NotFittedError
from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.features import extract_features
from lorarecycle.vit.lora import LoRA


@pytest.fixture
def halves(tiny_data: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    return tiny_data.split(2, torch.Generator().manual_seed(0))


def test_fit_predict_score(tiny_backbone: Backbone, halves: tuple[LabelledImages, LabelledImages]) -> None:
    support, query = halves
    classifier = FewShotClassifier(tiny_backbone)
    assert classifier.fit(support.images, support.labels) is classifier
    assert classifier.classes_.tolist() == [0, 1, 2, 3]
    assert classifier.prototypes_.shape == (4, 32)
    expected = extract_features(tiny_backbone, support.images[support.labels == 2]).mean(dim=0)
    np.testing.assert_allclose(classifier.prototypes_[2], expected, atol=1e-5)
    probabilities = classifier.predict_proba(query.images)
    assert probabilities.shape == (40, 4)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    predicted = classifier.predict(query.images)
    np.testing.assert_array_equal(predicted, classifier.classes_[probabilities.argmax(axis=1)])
    score = classifier.score(query.images, query.labels)
    assert score == pytest.approx((predicted == query.labels.numpy()).mean())
    assert score > 0.9
    assert classifier.transform(query.images).shape == (40, 32)


def test_images_of_any_kind(
    tiny_backbone: Backbone, halves: tuple[LabelledImages, LabelledImages], tmp_path: Path
) -> None:
    support, query = halves
    labels = support.labels.tolist()
    pictures = [to_pil_image(image) for image in support.images]
    files = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    expected = FewShotClassifier(tiny_backbone).fit(support.images, labels).predict_proba(query.images)
    arrays = support.images.permute(0, 2, 3, 1).numpy()
    for images in (pictures, files, list(map(str, files)), arrays, list(arrays), iter(pictures)):
        classifier = FewShotClassifier(tiny_backbone, batch_size=3).fit(images, labels)
        np.testing.assert_allclose(classifier.predict_proba(query.images), expected, atol=1e-5)
    assert classifier.predict(pictures[0]).shape == (1,)
    assert classifier.predict(files[0]).shape == (1,)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["pear", "apple", "fig", "kiwi"], ["apple", "fig", "kiwi", "pear"]),
        ([7, -1, 3, 2], [-1, 2, 3, 7]),
        (["pear", 1, (2, 3), None], ["pear", 1, (2, 3), None]),
        ([(1, 2), (0, 5), (0, 4), (3, 3)], [(0, 4), (0, 5), (1, 2), (3, 3)]),
        (np.array(["d", "c", "b", "a"]), ["a", "b", "c", "d"]),
        (torch.tensor([4, 3, 2, 1]), [1, 2, 3, 4]),
    ],
)
def test_labels_of_any_kind(
    tiny_backbone: Backbone, halves: tuple[LabelledImages, LabelledImages], names: list, order: list
) -> None:
    support, query = halves
    pick = (
        (lambda labels: names[labels]) if not isinstance(names, list) else (lambda labels: [names[c] for c in labels])
    )
    classifier = FewShotClassifier(tiny_backbone).fit(support.images, pick(support.labels))
    assert classifier.classes_.tolist() == order
    predicted = classifier.predict(query.images).tolist()
    assert set(map(type, predicted)) <= set(map(type, order))
    assert classifier.score(query.images, pick(query.labels)) > 0.9
    assert classifier.score(query.images, ["never seen"] * len(query)) == 0


def test_meta_lora_is_merged_once(
    tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter]
) -> None:
    adapter = make_adapter(tiny_backbone, head=False)
    images = tiny_data.images[:5]
    worn = extract_features(tiny_backbone, images, lora=LoRA.from_adapter(adapter))
    classifier = FewShotClassifier(tiny_backbone, adapter)
    np.testing.assert_allclose(classifier.fit_transform(images, range(5)), worn, atol=1e-4)
    assert np.abs(FewShotClassifier(tiny_backbone).fit_transform(images, range(5)) - worn.numpy()).max() > 0.01
    other = make_adapter(Backbone(tiny_backbone.vit), sites=("mlp.fc1",))
    bad = Adapter({"blocks.9.attn.q": other.factors["blocks.0.mlp.fc1"]}, name="deep")
    with pytest.raises(ValueError, match=r"deep.*blocks\.9"):
        FewShotClassifier(tiny_backbone, bad).fit(images, range(5))


def test_backbone_and_meta_lora_by_module_and_path(
    tiny_vit: torch.nn.Module, make_adapter: Callable[..., Adapter], tiny_data: LabelledImages, tmp_path: Path
) -> None:
    adapter = make_adapter(Backbone(tiny_vit), head=False)
    adapter.save(tmp_path / "meta")
    images = tiny_data.images[:3]
    by_path = FewShotClassifier(tiny_vit, tmp_path / "meta").fit_transform(images, range(3))
    by_value = FewShotClassifier(tiny_vit, adapter).fit(images, range(3)).transform(images)
    np.testing.assert_allclose(by_path, by_value, atol=1e-5)


def test_any_image_size(tiny_backbone: Backbone) -> None:
    classifier = FewShotClassifier(tiny_backbone, distance="cosine")
    images = [Image.new("RGB", (90, 40), "red"), Image.new("L", (16, 33), 90)]
    assert classifier.fit(images, ["red", "grey"]).predict(images).tolist() == ["red", "grey"]


def test_asking_before_fit(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    classifier = FewShotClassifier(tiny_backbone)
    names = ("predict", "predict_proba", "predict_log_proba", "decision_function", "logits", "transform")
    for ask in (getattr(classifier, name) for name in names):
        for kind in (NotFittedError, sklearn.exceptions.NotFittedError, labels.NotFittedError):
            with pytest.raises(kind, match="call `fit"):
                ask(tiny_data.images)
    with pytest.raises(NotFittedError):
        classifier.score(tiny_data.images, tiny_data.labels)
    with pytest.raises(NotFittedError):
        classifier.get_feature_names_out()


def test_bad_input(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    classifier = FewShotClassifier(tiny_backbone)
    images = tiny_data.images[:3]
    with pytest.raises(ValueError, match="got 2 labels for 3 images"):
        classifier.fit(images, [0, 1])
    with pytest.raises(ValueError, match="`X` must hold at least one image"):
        classifier.fit([], [])
    with pytest.raises(TypeError, match=r"`y\[1\]` must be hashable, got list"):
        classifier.fit(images, [0, [1], 2])
    with pytest.raises(ValueError, match=r"`y\[2\]` must be a label, got NaN"):
        classifier.fit(images, [0, 1, float("nan")])
    with pytest.raises(TypeError, match="`y` must be a sequence"):
        classifier.fit(images, "abc")
    with pytest.raises(ValueError, match="one axis"):
        classifier.fit(images, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="requires y to be passed"):
        classifier.fit(images, None)
    with pytest.raises(ValueError, match=r"`y` must hold classes, got 0.5 at 1\. Unknown label type: continuous"):
        classifier.fit(images, [0.0, 0.5, 1.0])
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.png must be readable"):
        classifier.fit([tmp_path / "bad.png"], ["a"])


def test_labels_in_a_column(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    images, column = tiny_data.images, tiny_data.labels[:, None]
    for y in (column, column.numpy()):
        with pytest.warns(sklearn.exceptions.DataConversionWarning, match=r"`y` \[48, 1\] is read as \[48\]"):
            assert FewShotClassifier(tiny_backbone).fit(images, y).score(images, tiny_data.labels) > 0.9


def test_parameters(tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter]) -> None:
    classifier = FewShotClassifier(tiny_backbone).fit(tiny_data.images, tiny_data.labels)
    assert classifier.set_params(distance="cosine").get_params()["distance"] == "cosine"
    with pytest.raises(ValueError, match="Invalid parameter 'colour'"):
        classifier.set_params(colour="red")
    classifier.set_params(meta_lora=make_adapter(tiny_backbone, name="meta"))
    assert "backbone=Backbone('tiny', 3 blocks, width 32, 32 pixels)" in repr(classifier)
    assert "meta_lora=Adapter('meta'," in repr(classifier)


@pytest.mark.medium
def test_compiled_blocks_give_the_same_answers(
    tiny_backbone: Backbone, halves: tuple[LabelledImages, LabelledImages]
) -> None:
    support, query = halves
    plain, compiled = (
        FewShotClassifier(tiny_backbone, compile=compile).fit(support.images, support.labels)
        for compile in (False, True)
    )
    np.testing.assert_allclose(compiled.logits(query.images), plain.logits(query.images), rtol=1e-3, atol=1e-4)


def test_many_classes_a_part_of_the_distances_at_a_time(tiny_backbone, tiny_data, monkeypatch):
    labels = [f"c{i}" for i in range(len(tiny_data))]
    classifier = FewShotClassifier(tiny_backbone).fit(tiny_data.images, labels)
    whole = classifier.logits(tiny_data.images).argmax(axis=-1)
    monkeypatch.setattr("lorarecycle.fewshot.classifier.AT_ONCE", 100)  # two queries of 48 classes
    assert list(classifier.predict(tiny_data.images)) == list(classifier.classes_[whole]) == labels
    assert classifier.score(tiny_data.images, labels) == 1
