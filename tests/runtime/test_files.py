"""Files are whole or absent."""

import errno
import os

import pytest
import torch

from lorarecycle.runtime import files


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = files.write_text(tmp_path / "a.txt", "earlier")

    def full(temporary):
        temporary.write_text("half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left on device; an earlier file is unchanged"):
        files.write_atomic(path, full)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_full_while_saving_tensors(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    path = files.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: .*No space left on device"):
        files.save_tensors(path, {"x": torch.zeros(3)})
    assert files.load_tensors(path)[0]["x"].tolist() == [1, 1, 1]


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / f"{files.LEFTOVER}abc").write_text("half")
    kept = files.write_json(tmp_path / "kept.json", {"a": 1})
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    assert files.read_json(kept) == {"a": 1}


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(6, dtype=torch.uint8).view(2, 3).T}
    path = files.save_tensors(tmp_path / "t.safetensors", tensors, {"step": 3})
    found, meta = files.load_tensors(path)
    assert meta["step"] == "3"
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        files.load_tensors(tmp_path / "absent.safetensors")
    path = files.save_tensors(tmp_path / "t.safetensors", {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"t\.safetensors must be a whole safetensors file"):
        files.load_tensors(path)
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        files.load_tensors(path)
    text = tmp_path / "t.json"
    text.write_text("{nothing")
    with pytest.raises(ValueError, match=r"t\.json must be JSON"):
        files.read_json(text)
