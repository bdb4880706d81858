"""uint8 batches: resizing and cropping, parts, normalisation. How images are read is in test_decode.py."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from lorarecycle import Backbone, FewShotClassifier
from lorarecycle.data.images import count_images, enlarge, normalize, to_batches, to_uint8


@pytest.fixture
def pixels() -> np.ndarray:
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 4, (rows + columns) * 2], axis=-1).astype(np.uint8)


def test_lists_may_mix_sizes_and_kinds(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mixed = [tmp_path / "a.png", pixels[:20], torch.rand(5, 3, 9, 9), Image.new("L", (7, 90), 80)]
    assert count_images(mixed) == 8
    batch = to_uint8(mixed, 16)
    assert batch.shape == (8, 3, 16, 16)
    assert (batch[-1] == 80).all()
    parts = list(to_batches(mixed, 16, 3))
    assert [len(part) for part in parts] == [2, 3, 3]
    assert torch.equal(torch.cat(parts), batch)


def test_every_kind_is_resized_alike(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [tmp_path / "a.png", Image.fromarray(pixels), pixels, pixels / 255, tensor, tensor.double() / 255]
    batch = to_uint8(kinds, 32)
    assert torch.equal(batch, batch[:1].expand_as(batch))


def test_shorter_side_is_resized_and_the_centre_kept() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 200  # the central square
    assert to_uint8(wide, 10).float().mean() == 200
    tall = Image.fromarray(wide).rotate(90, expand=True)
    assert to_uint8(tall, 10).float().mean() == 200


def test_a_batch_of_the_right_size_is_left_as_it_is() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_uint8(images, 8), images)


def test_the_result_does_not_share_memory_with_what_was_given() -> None:
    array = np.zeros((2, 3, 8, 8), np.uint8)
    to_uint8(array, 8).fill_(9)
    assert not array.any()


def test_resizing_is_bicubic_and_antialiased() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(images.float(), size=(16, 16), mode="bicubic", antialias=True)
    error = (to_uint8(images, 16).float() - expected.clamp(0, 255)).abs().max()
    assert error <= 1.01


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize(
    ("short", "long", "size"),
    [(1, 100, 16), (20, 2000, 32), (21, 1995, 32), (48, 72, 32), (50, 101, 25), (32, 321, 32), (30, 2999, 7)],
)
def test_cutting_long_images_first_gives_the_same_pixels(short: int, long: int, size: int, turn: bool) -> None:
    shape = (long, short) if turn else (short, long)
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = tvf.resize(images, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(to_uint8(images, size), tvf.center_crop(whole, [size, size]))


def test_long_images_are_cut_before_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    resize = tvf.resize
    monkeypatch.setattr(tvf, "resize", lambda x, *args, **kwargs: seen.append(x.shape) or resize(x, *args, **kwargs))
    to_uint8(torch.zeros(3, 20, 2000, dtype=torch.uint8), 32)
    assert seen[0][-1] < 60


def test_bytes_and_file_objects_are_one_image_for_the_classifier(tiny_backbone: Backbone, pixels: np.ndarray) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    classifier = FewShotClassifier(tiny_backbone).fit([pixels, pixels[::-1]], ["up", "down"])
    assert classifier.predict(file.getvalue()).tolist() == ["up"]
    assert classifier.predict(file).tolist() == ["up"]
    assert classifier.predict([file, file.getvalue()]).tolist() == ["up", "up"]
    assert classifier.fit(file, ["one"]).classes_.tolist() == ["one"]
    with pytest.raises(ValueError, match=r"`X` must be image files on this machine, got the URL 'https:"):
        classifier.predict("https://example.com/cat.jpg")


@pytest.mark.parametrize(("name", "size", "batch_size"), [("size", 0, 8), ("size", -3, 8), ("batch_size", 8, 0)])
def test_sizes_are_checked(name: str, size: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        list(to_batches(np.zeros((8, 8, 3), np.uint8), size, batch_size))


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalize(images, mean, std), expected)
    assert normalize(images, mean, std, torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 4, 4), r"torch.float32 \[2, 3, 4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"torch.uint8 \[3, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"torch.uint8 \[2, 1, 4, 4\]"),
    ],
)
def test_normalize_takes_uint8_batches_alone(images: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=rf"uint8 \[B, 3, H, W\], got {found}"):
        normalize(images, (0.5,) * 3, (0.5,) * 3)


def test_enlarging_keeps_gradients_and_is_free_at_the_same_size() -> None:
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert enlarge(x, 8) is x
    enlarge(x, 20).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
