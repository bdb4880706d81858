"""Class centres of a FewShotClassifier in a file: the same answers, and only with the model that made them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lorarecycle import Adapter, Backbone, FewShotClassifier, LabelledImages
from lorarecycle.fewshot.classifier import NotFittedError


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("names", [["w", "x", "y", "z"], [3, 1, 2, 0], ["x", 1, True, 2.0]])
def test_save_and_load(
    tiny_backbone: Backbone,
    tiny_data: LabelledImages,
    make_adapter: Callable[..., Adapter],
    tmp_path: Path,
    suffix: str,
    names: Sequence[object],
) -> None:
    adapter = make_adapter(tiny_backbone)
    fitted = FewShotClassifier(tiny_backbone, adapter).fit(tiny_data.images, [names[c] for c in tiny_data.labels])
    path = fitted.save_prototypes(tmp_path / f"p{suffix}")
    served = FewShotClassifier(tiny_backbone, adapter.with_head(None), distance="cosine")
    assert served.load_prototypes(path) is served
    np.testing.assert_array_equal(served.prototypes_, fitted.prototypes_)
    assert served.classes_.dtype == fitted.classes_.dtype
    assert served.classes_.tolist() == fitted.classes_.tolist()
    fitted.set_params(distance="cosine").fit(tiny_data.images, [names[c] for c in tiny_data.labels])
    np.testing.assert_array_equal(served.logits(tiny_data.images), fitted.logits(tiny_data.images))


def test_another_model_is_refused(
    tiny_backbone: Backbone,
    build_vit: Callable[..., torch.nn.Module],
    tiny_data: LabelledImages,
    make_adapter: Callable[..., Adapter],
    tmp_path: Path,
) -> None:
    adapter, images = make_adapter(tiny_backbone), tiny_data.images[:2]
    path = FewShotClassifier(tiny_backbone, adapter).fit(images, ["a", "b"]).save_prototypes(tmp_path / "p.npz")
    others = {
        "no meta-LoRA": FewShotClassifier(tiny_backbone),
        "another meta-LoRA": FewShotClassifier(tiny_backbone, make_adapter(tiny_backbone, seed=1)),
        "other weights": FewShotClassifier(build_vit(seed=1), adapter),
        "another normalisation": FewShotClassifier(Backbone(tiny_backbone.vit, mean=(0.1, 0.2, 0.3)), adapter),
        "another size": FewShotClassifier(Backbone(tiny_backbone.vit, image_size=64), adapter),
        "another width": FewShotClassifier(build_vit(embed_dim=64)),
    }
    for what, other in others.items():
        other.fit(images, ["c", "d"])
        with pytest.raises(ValueError, match=r"p\.npz must hold the centres of this model"):
            other.load_prototypes(path)
        assert other.predict(images).tolist() == ["c", "d"], f"{what}: still fitted as before"
    assert FewShotClassifier(tiny_backbone, adapter).load_prototypes(path).predict(images).tolist() == ["a", "b"]


def test_bad_input(tiny_backbone: Backbone, tiny_data: LabelledImages, tmp_path: Path) -> None:
    classifier = FewShotClassifier(tiny_backbone)
    with pytest.raises(NotFittedError, match="call `fit"):
        classifier.save_prototypes(tmp_path / "p.npz")
    with pytest.raises(FileNotFoundError, match="no prototypes"):
        classifier.load_prototypes(tmp_path / "absent.npz")
    classifier.fit(tiny_data.images[:2], [(1, 2), (3, 4)])
    with pytest.raises(ValueError, match="strings or numbers"):
        classifier.save_prototypes(tmp_path / "p.npz")
    with pytest.raises(ValueError, match="`distance` must be"):
        FewShotClassifier(tiny_backbone, distance="manhattan").load_prototypes(tmp_path / "p.npz")
    path = classifier.fit(tiny_data.images[:2], ["a", "b"]).save_prototypes(tmp_path / "p.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a whole file of `save_prototypes`"):
        classifier.load_prototypes(path)
