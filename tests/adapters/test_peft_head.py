"""The head of an adapter: beside its file, given, or described by the files of transformers."""

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.runtime.files import save_tensors, write_json

from .peft_models import (
    random_adapter,
    random_head,
)


@pytest.mark.parametrize("file", ["head.safetensors", "classifier.safetensors"])
def test_head_beside_the_adapter(file, tmp_path):
    random_adapter().save(tmp_path)
    head = random_head()
    save_tensors(tmp_path / file, {"weight": head.weight, "bias": head.bias})
    found = Adapter.load(tmp_path, class_names=["a", "b", "c"]).head
    assert torch.equal(found.weight, head.weight)
    assert found.class_names == ("a", "b", "c")
    assert found.pool == "token"


def test_given_head_replaces_a_saved_one(tmp_path):
    random_adapter(head=random_head()).save(tmp_path / "adapter")
    other = random_head(seed=8)
    assert Adapter.load(tmp_path / "adapter", head=other).head is other
    wide = random_head("token+mean")
    save_tensors(tmp_path / "given.safetensors", {"classifier.weight": wide.weight})
    found = Adapter.load(tmp_path / "adapter", head=tmp_path / "given.safetensors").head
    assert torch.equal(found.weight, wide.weight)
    assert found.pool == "token+mean"
    assert not found.bias.any()


def test_class_names_and_normalisation_from_the_files_of_transformers(tmp_path):
    random_adapter(head=random_head()).save(tmp_path)
    (tmp_path / "lorarecycle.json").unlink()
    write_json(tmp_path / "config.json", {"id2label": {"1": "dog", "0": "cat", "2": "owl"}})
    write_json(tmp_path / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    adapter = Adapter.load(tmp_path)
    assert adapter.head.class_names == ("cat", "dog", "owl")
    assert (adapter.mean, adapter.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert adapter.name == tmp_path.name
