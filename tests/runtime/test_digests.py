"""Files of ours say what was written: whatever was changed in one that still parses is named."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorarecycle.runtime.digests import KEY
from lorarecycle.runtime.files import load_tensors, save_tensors

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(True),
    "c": torch.zeros(0, 2),
    "d": torch.ones(2).bfloat16(),
}


def raw(path):
    """What the file holds, digests included."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def path(tmp_path):
    return save_tensors(tmp_path / "t.safetensors", TENSORS, {"step": 3, "name": "é"})


def test_somebody_else_s_hash_is_none_of_ours(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"sha256": "5f2c"})
    assert load_tensors(tmp_path / "a.safetensors")[1] == {"sha256": "5f2c"}


def test_what_was_written_comes_back_without_digests(path):
    tensors, strings = load_tensors(path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in TENSORS.items()}
    assert strings == {"format": "pt", "step": "3", "name": json.dumps("é")}
    assert load_tensors(path, skip=("a",))[0].keys() == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("tensors", "strings", "found"),
    [
        ({"a": TENSORS["a"] + 1e-6}, {}, "another 'a'"),
        ({"a": TENSORS["a"].double()}, {}, "another 'a'"),
        ({"a": TENSORS["a"].view(3, 2).contiguous()}, {}, "another 'a'"),
        ({"c": torch.zeros(2, 0)}, {}, "another 'c'"),
        ({"e": torch.ones(1)}, {}, "'e' missing or added"),
        ({"b": None}, {}, "'b' missing or added"),
        ({}, {"step": "4"}, "other metadata"),
        ({}, {"more": "4"}, "other metadata"),
        ({}, {KEY: "{"}, "that does not parse"),
    ],
)
def test_a_change_is_named(path, tensors, strings, found):
    before, meta = raw(path)
    changed = {name: tensor for name, tensor in {**before, **tensors}.items() if tensor is not None}
    save_file(changed, path, metadata={**meta, **strings})
    with pytest.raises(ValueError, match=rf"t\.safetensors must be what was written, got .*{found}"):
        load_tensors(path)


def test_files_of_others_have_none(path):
    tensors, meta = raw(path)
    del meta[KEY]
    save_file({**tensors, "a": TENSORS["a"] + 1}, path, metadata=meta)
    assert load_tensors(path)[0]["a"].tolist() == [[1, 2, 3], [4, 5, 6]]
