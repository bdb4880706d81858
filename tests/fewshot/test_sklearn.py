"""FewShotClassifier inside scikit-learn: its own checks, parameters, images, pipelines, scores and threads."""

import functools
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data
from torchvision.transforms.v2.functional import to_pil_image

from lorarecycle import Adapter, Backbone, FewShotClassifier, LabelledImages

pytestmark = pytest.mark.medium

EXPECTED_FAILURES: dict[str, str] = {}
"""Checks that images rule out, with the reason: none, once rows are read as images."""


class RowClassifier(FewShotClassifier):
    """Reads rows of numbers as images of 8 x 8 pixels, in which each number fills several."""

    def _images(self, X: Any, *, fitting: bool) -> np.ndarray:
        rows = validate_data(self, X, reset=fitting, dtype=np.float64)
        pixels = np.clip(rows / 8 + 0.5, 0, 1)
        repeats = -(-8 * 8 * 3 // rows.shape[1])
        return np.tile(pixels, (1, repeats))[:, : 8 * 8 * 3].reshape(-1, 8, 8, 3)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def test_scikit_learns_own_checks(vit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in float64 an image's features do not depend on the others in its batch, to the digits that the checks compare
    double = staticmethod(functools.partial(Backbone.load, dtype=torch.float64))
    monkeypatch.setattr(Backbone, "load", double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            RowClassifier(str(vit_folder)), expected_failed_checks=EXPECTED_FAILURES, on_skip=None, on_fail=None
        )
    counts = Counter(result["status"] for result in results)
    lines = [f"check_estimator of scikit-learn {sklearn.__version__}: {dict(counts)}"]
    for result in results:
        if result["status"] != "passed":
            reason = result["expected_to_fail_reason"] if result["expected_to_fail"] else result["exception"]
            lines.append(f"{result['status']}: {result['check_name']}: {reason}")
    sys.stdout.write("\n".join(["", *lines, ""]))
    assert not counts["failed"], "\n".join(lines)
    assert counts["xfail"] == len(EXPECTED_FAILURES), "a failure is expected that does not happen"
    assert counts["passed"] > 50
    absent = re.compile("SCIPY_ARRAY_API is not set|pandas is not installed")
    assert all(absent.match(str(r["exception"])) for r in results if r["status"] == "skipped"), "\n".join(lines)


def test_the_constructor_stores_and_nothing_else() -> None:
    nonsense = {"backbone": 3, "meta_lora": "nowhere", "distance": "manhattan", "batch_size": -1, "n_jobs": 0}
    nonsense["compile"] = "perhaps"
    classifier = FewShotClassifier(**nonsense)
    assert vars(classifier) == classifier.get_params() == nonsense
    twin = clone(classifier)
    assert type(twin) is FewShotClassifier
    assert vars(twin) == nonsense


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"distance": "manhattan"}, ValueError, "`distance` must be 'euclidean'.*got 'manhattan'"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": 2.5}, ValueError, "`batch_size` must be at least 1, got 2.5"),
        ({"compile": "yes"}, ValueError, "`compile` must be True or False, got 'yes'"),
        ({"n_jobs": 0}, ValueError, "`n_jobs` must be None, a number of threads, or -1 for all cores, got 0"),
        ({"backbone": None}, TypeError, "`backbone` must be a Backbone.*got NoneType"),
        ({"backbone": "no-such-model"}, ValueError, "`base` must be a timm model name.*'no-such-model'"),
        ({"meta_lora": 7}, TypeError, "`meta_lora` must be an Adapter.*got int"),
        ({"meta_lora": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_a_bad_parameter_breaks_nothing(
    tiny_backbone: Backbone, tiny_data: LabelledImages, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    classifier = FewShotClassifier(tiny_backbone).fit(tiny_data.images, tiny_data.labels)
    expected = classifier.predict_proba(tiny_data.images)
    classifier.set_params(**wrong)
    np.testing.assert_array_equal(classifier.predict_proba(tiny_data.images), expected)
    with pytest.raises(error, match=message):
        classifier.fit(tiny_data.images[:2], ["a", "b"])
    np.testing.assert_array_equal(classifier.predict_proba(tiny_data.images), expected)
    assert classifier.classes_.tolist() == [0, 1, 2, 3]


def test_predictions_use_what_fit_built(
    tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter]
) -> None:
    images, labels = tiny_data.images, tiny_data.labels
    classifier = FewShotClassifier(tiny_backbone).fit(images, labels)
    before = classifier.logits(images)
    classifier.set_params(meta_lora=make_adapter(tiny_backbone), distance="cosine")
    np.testing.assert_array_equal(classifier.logits(images), before)
    after = classifier.fit(images, labels).logits(images)
    assert np.abs(after - before).max() > 0.1


def test_cross_validation_of_every_kind_of_images(
    tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path
) -> None:
    labels = tiny_data.labels.numpy()
    names = np.array(["ash", "elm", "fir", "oak"])[labels]
    arrays = tiny_data.images.permute(0, 2, 3, 1).numpy()
    pictures = [to_pil_image(image) for image in tiny_data.images]
    files = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    objects = np.empty(len(files), dtype=object)
    objects[:] = files
    kinds = {
        "tensor": tiny_data.images,
        "array": arrays,
        "list of arrays": list(arrays),
        "pictures": pictures,
        "paths": files,
        "object array": objects,
        "array of names": np.array([str(file) for file in files]),
    }
    for kind, X in kinds.items():
        scores = cross_val_score(FewShotClassifier(tiny_backbone), X, names, cv=3)
        assert scores.min() > 0.8, kind
        assert scores.tolist() == cross_val_score(FewShotClassifier(tiny_backbone), arrays, labels, cv=3).tolist(), kind


def test_pandas(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    files = [str(tmp_path / f"{i}.png") for i in range(len(tiny_data))]
    for image, file in zip(tiny_data.images, files, strict=True):
        to_pil_image(image).save(file)
    frame = pandas.DataFrame({"path": files, "kind": [f"kind {int(c)}" for c in tiny_data.labels]})
    frame.index += 100  # positions are not labels
    classifier = FewShotClassifier(tiny_backbone)
    assert cross_val_score(classifier, frame["path"], frame["kind"], cv=3).min() > 0.8
    assert cross_val_score(classifier, frame[["path"]], frame["kind"].astype("category"), cv=3).min() > 0.8
    classifier.set_output(transform="pandas")
    features = classifier.fit_transform(frame["path"], frame["kind"])
    assert list(features.columns[:2]) == ["fewshotclassifier0", "fewshotclassifier1"]
    assert features.shape == (48, 32)
    assert (features.index == frame.index).all()
    assert clone(classifier).fit(files, frame["kind"]).transform(files[:2]).shape == (2, 32)
    with pytest.raises(ValueError, match=r"one column of paths.*\['path', 'kind'\]"):
        classifier.fit(frame, frame["kind"])


def test_pipelines(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    images, labels = tiny_data.images.numpy(), tiny_data.labels.numpy()
    last = Pipeline([("classifier", FewShotClassifier(tiny_backbone))]).fit(images, labels)
    assert last.score(images, labels, sample_weight=None) > 0.9
    assert last["classifier"].backbone is tiny_backbone
    first = make_pipeline(FewShotClassifier(tiny_backbone), LogisticRegression(max_iter=200))
    assert cross_val_score(first, images, labels, cv=3).min() > 0.8
    assert "FewShotClassifier(backbone=Backbone('tiny', 3 blocks," in repr(first)
    first[0].set_output(transform="default")
    fitted = clone(first).fit(images, labels)
    np.testing.assert_array_equal(fitted[0].transform(images), fitted[0].fit_transform(images, labels))
    assert fitted[:1].get_feature_names_out()[-1] == "fewshotclassifier31"


def test_scores_of_scikit_learn(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    classifier = FewShotClassifier(tiny_backbone)
    two = tiny_data.labels < 2
    images, labels = tiny_data.images[two].numpy(), np.array(["no", "yes"])[tiny_data.labels[two]]
    decision = classifier.fit(images, labels).decision_function(images)
    assert decision.shape == (24,)
    np.testing.assert_array_equal(classifier.classes_[(decision > 0).astype(int)], classifier.predict(images))
    assert cross_val_score(classifier, images, labels, cv=3, scoring="roc_auc").min() > 0.9
    assert cross_val_score(classifier, images, labels, cv=3, scoring="neg_log_loss").max() < 0
    assert classifier.fit(tiny_data.images, tiny_data.labels).decision_function(images).shape == (24, 4)
    wrong = tiny_data.labels.numpy().copy()
    wrong[:12] = 9
    weights = np.where(wrong == 9, 3.0, 1.0)
    plain = classifier.score(tiny_data.images, wrong)
    assert classifier.score(tiny_data.images, wrong, sample_weight=weights) == pytest.approx(plain / 1.5)
    assert classifier.score(X=tiny_data.images, y=wrong, sample_weight=np.ones(48)) == plain
    for bad in (np.ones(3), np.zeros(48), -np.ones(48), np.full(48, np.nan)):
        with pytest.raises(ValueError, match="`sample_weight` must be 48 finite numbers"):
            classifier.score(tiny_data.images, wrong, sample_weight=bad)


def test_old_argument_names(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    images, labels = tiny_data.images, tiny_data.labels
    old: Any = FewShotClassifier(tiny_backbone)
    with (
        pytest.warns(DeprecationWarning, match="`support_labels` is called `y`"),
        pytest.warns(DeprecationWarning, match=r"`support_images` is called `X`"),
    ):
        old.fit(support_images=images, support_labels=labels)
    new = FewShotClassifier(tiny_backbone).fit(X=images, y=labels)
    np.testing.assert_array_equal(old.prototypes_, new.prototypes_)
    for name in ("predict", "predict_proba", "decision_function"):
        with pytest.warns(DeprecationWarning, match="`query_images` is called `X`"):
            answer = getattr(old, name)(query_images=images)
        np.testing.assert_array_equal(answer, getattr(new, name)(X=images))
    with (
        pytest.warns(DeprecationWarning, match="`query_images` is called `X`"),
        pytest.warns(DeprecationWarning, match="`query_labels` is called `y`"),
    ):
        assert old.score(query_images=images, query_labels=labels) == new.score(images, labels)
    with pytest.warns(DeprecationWarning, match="`images` is called `X`"):
        np.testing.assert_array_equal(old.transform(images=images), new.transform(X=images))


def test_files_are_decoded_by_n_jobs_threads(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    files = [tmp_path / f"{i}.jpg" for i in range(12)]
    for i, file in enumerate(files):
        Image.fromarray(random.integers(0, 256, (50 + i, 70, 3), dtype=np.uint8)).save(file)
    labels = [i % 3 for i in range(12)]
    expected = FewShotClassifier(tiny_backbone).fit(files, labels).logits(files)
    opened, threads, meeting = Image.open, set(), threading.Barrier(2, timeout=30)

    def open_in_pairs(path: Path) -> Image.Image:
        meeting.wait()  # one thread alone would never get past it
        threads.add(threading.get_ident())
        return opened(path)

    monkeypatch.setattr(Image, "open", open_in_pairs)
    classifier = FewShotClassifier(tiny_backbone, n_jobs=2, batch_size=5).fit(np.array(files), labels)
    np.testing.assert_allclose(classifier.logits(files), expected, atol=1e-5)
    assert threading.get_ident() not in threads
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"no image file .*gone\.jpg"):
        classifier.predict([*files, tmp_path / "gone.jpg"])
