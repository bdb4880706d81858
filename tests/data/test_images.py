"""Images of every kind become the same uint8 batch; what is no image is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorarecycle.data.images import count_images, normalize, to_batches, to_uint8


@pytest.fixture
def pixels() -> np.ndarray:
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 4, (rows + columns) * 2], axis=-1).astype(np.uint8)


def test_every_kind_of_input_gives_the_same_pixels(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = to_uint8(tensor[None], 32)
    assert expected.shape == (1, 3, 32, 32)
    assert expected.dtype == torch.uint8
    kinds = {
        "PIL": Image.fromarray(pixels),
        "path": tmp_path / "a.png",
        "string": str(tmp_path / "a.png"),
        "numpy HWC": pixels,
        "numpy CHW": pixels.transpose(2, 0, 1),
        "numpy float": pixels.astype(np.float64) / 255,
        "numpy int64": pixels.astype(np.int64),
        "numpy big-endian": pixels.astype(">i4"),
        "numpy NHWC": pixels[None],
        "CHW": tensor,
        "HWC": torch.from_numpy(pixels),
        "half": (tensor / 255).double(),
        "list": [pixels],
        "nested": [[tensor[None]]],
        "RGBA": Image.fromarray(pixels).convert("RGBA"),
        "array of paths": np.array([str(tmp_path / "a.png")]),
        "generator": (image for image in [pixels]),
    }
    for kind, image in kinds.items():
        assert torch.equal(to_uint8(image, 32), expected), kind


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


def test_shorter_side_is_resized_and_the_centre_kept() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 200  # the central square
    assert to_uint8(wide, 10).float().mean() == 200
    tall = Image.fromarray(wide).rotate(90, expand=True)
    assert to_uint8(tall, 10).float().mean() == 200


def test_a_batch_of_the_right_size_is_left_as_it_is() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(to_uint8(images, 8), images)


def test_resizing_is_bicubic_and_antialiased() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(images.float(), size=(16, 16), mode="bicubic", antialias=True)
    error = (to_uint8(images, 16).float() - expected.clamp(0, 255)).abs().max()
    assert error <= 1.01


def test_grey_palette_sixteen_bit_and_cmyk(tmp_path: Path) -> None:
    grey = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    expected = torch.from_numpy(grey).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(grey, 16), expected)
    assert torch.equal(to_uint8(grey[..., None], 16), expected)
    assert torch.equal(to_uint8(Image.fromarray(grey), 16), expected)
    assert torch.equal(to_uint8(Image.fromarray(grey).convert("P"), 16), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    assert torch.equal(to_uint8(tmp_path / "deep.png", 16), expected)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.info["transparency"] = 0
    assert to_uint8(palette, 8)[0, :, 0, 0].tolist() == [10, 20, 30]
    assert to_uint8(Image.new("CMYK", (8, 8)), 8).float().mean() == 255
    assert to_uint8(Image.new("LA", (8, 8), (7, 0)), 8).float().mean() == 7


def test_files_are_turned_upright_by_exif(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = to_uint8(tmp_path / "turned.png", 20)
    assert image[..., :10, :].max() == 0
    assert image[..., 10:, :].min() == 255


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "`images` must hold at least one image"),
        (iter(()), ValueError, "`images` must hold at least one image"),
        (np.zeros((2, 8, 8)), ValueError, r"`images` must have 1, 3 or 4 channels.*\[2, 8, 8\]"),
        (
            [np.zeros((8, 8, 3)), np.zeros((8, 8, 5))],
            ValueError,
            r"`images\[1\]` must have 1, 3 or 4 channels",
        ),
        (torch.zeros(0, 3, 8, 8), ValueError, r"shape \[0, 3, 8, 8\]"),
        (torch.zeros(7), ValueError, r"shape \[7\]"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "`images` must be finite, got 192 NaN"),
        (torch.full((3, 8, 8), 16.0), ValueError, r"floats in \[0, 1\], got 16 to 16"),
        (torch.full((3, 8, 8), -2.0), ValueError, "undo the normalisation"),
        (np.full((8, 8, 3), 300), ValueError, "integers 0 to 255, got 300 to 300"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), TypeError, "torch.bool"),
        ([3.5], TypeError, r"`images\[0\]` must be a PIL image.*got float"),
        (None, TypeError, "got NoneType"),
        ({"a": 1}, TypeError, "got dict"),
        (b"abc", TypeError, "got bytes"),
    ],
)
def test_what_is_no_image_is_refused(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_uint8(images, 8)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        to_uint8(tmp_path / "absent.png", 8)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"image file .*text\.png must be readable.*replace or remove"):
        to_uint8([tmp_path / "text.png"], 8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("short.png", "short.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            to_uint8(tmp_path / name, 8)
    with pytest.raises(ValueError, match="image file"):
        to_uint8(tmp_path, 8)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="`size` must be at least 1, got 0"):
        to_uint8(np.zeros((8, 8, 3), np.uint8), 0)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        list(to_batches(np.zeros((8, 8, 3), np.uint8), 8, 0))


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(normalize(images, mean, std), expected)
    assert normalize(images, mean, std, torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\], got torch.float32"):
        normalize(images.float(), mean, std)
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        normalize(images[0], mean, std)
