"""Surrogates and their files."""

import json

import pytest
import torch

from lorarecycle import Surrogate
from lorarecycle.runtime.files import load_tensors, save_tensors


def surrogate(**changes) -> Surrogate:
    g = torch.Generator().manual_seed(0)
    fields = {
        "images": torch.randint(0, 256, (6, 3, 16, 24), generator=g, dtype=torch.uint8),
        "labels": torch.arange(6) % 2,
        "teacher_logits": torch.randn(6, 2, generator=g),
        "class_names": ("cat", "dog"),
        "patch_size": 8,
        "kept": torch.tensor([[0, 3], [1, 2], [4, 5], [0, 1], [2, 3], [1, 5]]),
        "scores": torch.rand(6, 6, generator=g),
        "adapter": "a",
        "adapter_digest": "f00",
        "config": {"steps": 3},
        **changes,
    }
    return Surrogate(**fields)


UNLABELLED = {"labels": None, "teacher_logits": None, "class_names": ()}


@pytest.mark.parametrize("changes", [{}, {"kept": None}, {"scores": None}, UNLABELLED])
def test_file_round_trip(tmp_path, changes):
    made = surrogate(**changes)
    found = Surrogate.load(made.save(tmp_path / "s.safetensors"))
    for name in ("images", "labels", "teacher_logits", "kept", "scores"):
        a, b = getattr(made, name), getattr(found, name)
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype), name
    for name in ("class_names", "patch_size", "adapter", "adapter_digest", "config"):
        assert getattr(made, name) == getattr(found, name)
    assert found.grid == (2, 3)


def test_masks_keep_the_highest_scores():
    made = surrogate()
    masked = made.masked(0.5)
    assert masked.kept.shape == (6, 3)
    for row, kept in zip(made.scores, masked.kept, strict=True):
        assert set(kept.tolist()) == set(row.topk(3).indices.tolist())
    assert made.masked(0.0).kept.tolist() == [list(range(6))] * 6


def test_bad_surrogates(tmp_path):
    with pytest.raises(ValueError, match=r"`images` must be uint8 \[n, 3, H, W\]"):
        surrogate(images=torch.rand(6, 3, 16, 24))
    with pytest.raises(ValueError, match="`labels` must have one row per image"):
        surrogate(labels=torch.arange(5))
    with pytest.raises(ValueError, match="`teacher_logits` must have a column per class"):
        surrogate(teacher_logits=torch.randn(6, 3))
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\)"):
        surrogate().masked(1.0)
    with pytest.raises(ValueError, match="must hold scores"):
        surrogate(scores=None).masked(0.5)
    with pytest.raises(ValueError, match=r"must be a surrogate of a format in \(1, 2\), got None"):
        Surrogate.load(save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}))
    path = surrogate().save(tmp_path / "s.safetensors")
    tensors, strings = load_tensors(path)
    facts = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    del tensors["images"]
    with pytest.raises(ValueError, match=r"s\.safetensors .*images"):  # its digests say that it is whole
        Surrogate.load(save_tensors(path, tensors, facts))
    path = surrogate().save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        Surrogate.load(path)
