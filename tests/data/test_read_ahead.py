"""Images decoded by threads: the same bytes in the same order, several at once, and no further ahead than said."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorarecycle.data.images import to_uint8
from lorarecycle.data.read_ahead import read_ahead


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Nine noisy pictures of different sizes, JPEG and PNG."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(9):
        pixels = random.integers(0, 256, (40 + 7 * i, 60 - 3 * i, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_same_images_in_the_same_order(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = to_uint8(files, 32)
    opened = Image.open

    def open_late(path: Path) -> Image.Image:  # the first files take longest
        time.sleep(0.01 * (9 - int(Path(path).stem)))
        return opened(path)

    monkeypatch.setattr(Image, "open", open_late)
    assert torch.equal(torch.cat(list(read_ahead(files, 32, workers=3))), expected)


def test_two_files_are_open_at_once(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, meeting = Image.open, threading.Barrier(2, timeout=30)

    def open_in_pairs(path: Path) -> Image.Image:
        meeting.wait()  # one thread alone would never get past it
        return opened(path)

    monkeypatch.setattr(Image, "open", open_in_pairs)
    assert len(list(read_ahead(files[:8], 32, workers=2))) == 8


def test_entries_of_many_kinds_and_errors_in_their_turn(files: list[Path], tmp_path: Path) -> None:
    batch = np.zeros((2, 8, 8, 3), np.uint8)
    parts = read_ahead([files[0], batch, Image.new("L", (9, 9)), tmp_path / "no.png"], 8, workers=2, name="X")
    assert [next(parts).shape[0] for _ in range(3)] == [1, 2, 1]
    with pytest.raises(FileNotFoundError, match=r"no image file .*no\.png"):
        next(parts)
    with pytest.raises(TypeError, match=r"`X\[1\]` must be a PIL image"):
        list(read_ahead([files[0], 3], 8, workers=2, name="X"))


def test_no_further_ahead_than_asked(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(Image, "open", lambda path, inner=Image.open: (opened.append(path), inner(path))[1])
    parts = read_ahead(files, 8, workers=2, ahead=1)
    next(parts)
    time.sleep(0.2)
    assert 1 <= len(opened) <= 3
    parts.close()
    time.sleep(0.2)
    assert len(opened) <= 3, "reads on though nobody asks"
