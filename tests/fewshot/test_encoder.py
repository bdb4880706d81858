"""One model in one process: clones, searches and pickles of FewShotClassifier neither load nor copy it again."""

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from lorarecycle import Adapter, Backbone, FewShotClassifier, LabelledImages
from lorarecycle.fewshot import encoder

pytestmark = pytest.mark.medium


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a backbone was loaded, and an adapter merged or read."""
    counts: Counter[str] = Counter()
    load, merge, read = Backbone.load.__func__, Backbone.merge, Adapter.load.__func__  # type: ignore[attr-defined]

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Backbone, "load", classmethod(counting("load", load)))
    monkeypatch.setattr(Backbone, "merge", counting("merge", merge))
    monkeypatch.setattr(Adapter, "load", classmethod(counting("read", read)))
    encoder.forget_encoders()
    return counts


def test_clones_share_one_model(
    tiny_data: LabelledImages, make_adapter: Callable[..., Adapter], counted: Counter[str], tmp_path: Path
) -> None:
    images, labels = tiny_data.images[::3], tiny_data.labels[::3]
    make_adapter(Backbone.load("demo"), size=0.05).save(tmp_path / "meta")
    counted.clear()
    classifier = FewShotClassifier("demo", tmp_path / "meta", n_jobs=2)
    fitted = [clone(classifier).fit(images, labels) for _ in range(3)]
    fitted.append(clone(fitted[0]).set_params(distance="cosine").fit(images, labels))
    assert counted == {"load": 1, "merge": 1, "read": 1}
    assert len({id(c._fitted.encoder.model) for c in fitted}) == 1
    assert not hasattr(clone(fitted[0]), "classes_")
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(fitted[0]))
    plain = clone(classifier).set_params(meta_lora=None).fit(images, labels)
    assert counted == {"load": 1, "merge": 1, "read": 1}
    own = {w.data_ptr() for w in fitted[0]._fitted.encoder.model.parameters()}
    shared = [w.data_ptr() in own for w in plain._fitted.encoder.model.parameters()]
    assert shared.count(False) == 6, "the weights of q and v in the six blocks, and no others, are copies"


def test_weights_that_changed_are_read_again(
    build_vit: Callable[..., Any],
    tiny_data: LabelledImages,
    make_adapter: Callable[..., Adapter],
    tmp_path: Path,
) -> None:
    images, labels, vit = tiny_data.images, tiny_data.labels, build_vit()
    make_adapter(Backbone(vit), seed=1).save(tmp_path / "meta")
    classifier = FewShotClassifier(vit, tmp_path / "meta")
    first = classifier.fit(images, labels).prototypes_
    make_adapter(Backbone(vit), seed=2).save(tmp_path / "meta")
    second = classifier.fit(images, labels).prototypes_
    assert np.abs(second - first).max() > 0.1, "another adapter lies in the folder"
    with torch.no_grad():
        vit.blocks[0].attn.proj.weight.mul_(-1)
    assert np.abs(classifier.fit(images, labels).prototypes_ - second).max() > 0.1, "the module was trained further"


def test_an_encoder_is_freed_when_nobody_holds_it(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    encoder.forget_encoders()
    before = len(encoder._shared)
    classifier = FewShotClassifier(tiny_backbone).fit(tiny_data.images[:2], ["a", "b"])
    assert len(encoder._shared) == before + 1
    del classifier
    encoder.forget_encoders()
    assert len(encoder._shared) == before


def test_grid_search_over_distance_and_meta_lora(
    tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter], counted: Counter[str]
) -> None:
    images, labels = tiny_data.images.numpy(), tiny_data.labels.numpy()
    bad = make_adapter(tiny_backbone, size=30.0, sites=("attn.proj",), name="bad")
    grid = {
        "c__meta_lora": [None, make_adapter(tiny_backbone, size=0.01), bad],
        "c__distance": ["euclidean", "cosine"],
    }
    pipeline = Pipeline([("c", FewShotClassifier(tiny_backbone))])
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(images, labels)
    assert search.best_score_ > 0.9
    assert search.best_params_["c__meta_lora"] is not bad
    assert counted["load"] == 0
    assert counted["merge"] == 2, "two adapters, in three folds, with two distances, and the refit"
    own = search.best_estimator_["c"]._fitted.encoder.model.vit.patch_embed.proj.weight
    assert own.data_ptr() == tiny_backbone.vit.patch_embed.proj.weight.data_ptr(), "no weights are copied"
    over_backbones = GridSearchCV(FewShotClassifier("demo"), {"backbone": [tiny_backbone, "demo"]}, cv=2)
    assert over_backbones.fit(images, labels).cv_results_["param_backbone"][0] is tiny_backbone


@pytest.mark.slow
def test_searches_in_other_processes(vit_folder: Path, tiny_data: LabelledImages) -> None:
    images, labels = tiny_data.images.numpy(), tiny_data.labels.numpy()
    search = GridSearchCV(FewShotClassifier(vit_folder), {"distance": ["euclidean", "sqeuclidean"]}, cv=3, n_jobs=2)
    scores = search.fit(images, labels).cv_results_["mean_test_score"]
    assert scores[0] == scores[1] == cross_val_score(FewShotClassifier(vit_folder), images, labels, cv=3).mean()
    with joblib.parallel_config("threading", n_jobs=2):
        assert cross_val_score(FewShotClassifier(vit_folder), images, labels, cv=3).mean() == scores[0]


@pytest.fixture
def in_a_fresh_process(tmp_path: Path) -> Callable[[dict[str, FewShotClassifier], np.ndarray], dict[str, np.ndarray]]:
    """Writes classifiers with joblib to `<name>.joblib`; gives their logits in another process."""

    def ask(classifiers: dict[str, FewShotClassifier], images: np.ndarray) -> dict[str, np.ndarray]:
        np.save(tmp_path / "images.npy", images)
        for name, classifier in classifiers.items():
            joblib.dump(classifier, tmp_path / f"{name}.joblib")
        code = (
            "import joblib, numpy as np\n"
            "images = np.load('images.npy')\n"
            f"answers = {{name: joblib.load(name + '.joblib').logits(images) for name in {list(classifiers)}}}\n"
            "np.savez('answers.npz', **answers)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(np.load(tmp_path / "answers.npz"))

    return ask


@pytest.mark.slow
def test_pickles_work_in_a_fresh_process(
    vit_folder: Path,
    build_vit: Callable[..., Any],
    tiny_data: LabelledImages,
    make_adapter: Callable[..., Adapter],
    in_a_fresh_process: Callable[..., dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    images, labels = tiny_data.images.permute(0, 2, 3, 1).numpy(), tiny_data.labels
    module = build_vit(embed_dim=128)
    backbone = Backbone(module, name="wide")
    adapter = make_adapter(backbone)
    make_adapter(Backbone.load(vit_folder)).save(tmp_path / "meta")
    classifiers = {
        "named": FewShotClassifier(str(vit_folder), tmp_path / "meta"),
        "plain": FewShotClassifier(backbone),
        "backbone": FewShotClassifier(backbone, adapter, distance="cosine"),
        "merged": FewShotClassifier(backbone.merge(make_adapter(backbone, seed=3)), adapter),
        "module": FewShotClassifier(module, adapter),
    }
    expected = {name: classifier.fit(images, labels).logits(images) for name, classifier in classifiers.items()}
    for file in (tmp_path / "meta").iterdir():
        file.unlink()  # the meta-LoRA travels inside
    answers = in_a_fresh_process(classifiers, images)
    for name, logits in expected.items():
        np.testing.assert_allclose(answers[name], logits, atol=1e-4, err_msg=name)
    weights = sum(w.nbytes for w in module.parameters())
    sizes = {name: (tmp_path / f"{name}.joblib").stat().st_size for name in classifiers}
    assert sizes["named"] < (vit_folder / "model.safetensors").stat().st_size / 2, "the backbone's weights are in it"
    for name in ("plain", "backbone", "merged", "module"):
        assert weights < sizes[name] < 1.2 * weights, f"{name}: the weights are stored once, the merged ones never"
    assert classifiers["backbone"].backbone is backbone
    assert classifiers["merged"].backbone.unmerge() is backbone, "pickling leaves the original as it is"


def test_what_a_pickle_keeps(
    vit_folder: Path, tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter]
) -> None:
    images, labels = tiny_data.images, tiny_data.labels
    classifier = FewShotClassifier(tiny_backbone, make_adapter(tiny_backbone)).fit(images, labels)
    expected = classifier.logits(images)
    classifier.set_params(distance="cosine", meta_lora=None, backbone=str(vit_folder))  # for the next fit
    again = pickle.loads(pickle.dumps(classifier))
    assert again.get_params() == classifier.get_params()
    np.testing.assert_allclose(again.logits(images), expected, atol=1e-4)
    assert np.abs(again.fit(images, labels).logits(images)).max() <= 2, "cosine"
    unfitted = pickle.loads(pickle.dumps(FewShotClassifier(tiny_backbone)))
    assert unfitted.fit(images, labels).score(images, labels) > 0.9


def test_a_pickle_whose_backbone_is_another_one_by_now(vit_folder: Path, tiny_data: LabelledImages) -> None:
    classifier = FewShotClassifier(vit_folder).fit(tiny_data.images, tiny_data.labels)
    stored = pickle.dumps(classifier)
    again = pickle.loads(stored)
    assert again._fitted.encoder is classifier._fitted.encoder, "one model in one process"
    (vit_folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}'
    )
    with pytest.raises(ValueError, match="must be the model that the pickled classifier was fitted with"):
        pickle.loads(stored)
    for file in vit_folder.iterdir():
        file.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="vit"):
        pickle.loads(stored)
    assert classifier.predict(tiny_data.images).shape == (48,), "the one in memory goes on"
