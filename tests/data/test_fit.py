"""How images become squares: crop and squash, as torchvision, transformers and timm do it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from lorarecycle.data.images import Fit, to_uint8


def photo(height, width, seed=0):
    """A smooth picture, so that resamplers agree."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30), (200, 90), (16, 48)], ids=str)
@pytest.mark.parametrize("fit", [Fit(32), Fit(32, "squash"), Fit(32, "crop", 0.875), Fit(32, "squash", 0.9)], ids=str)
def test_as_torchvision_does(shape, fit):
    image = torch.from_numpy(photo(*shape).copy()).permute(2, 0, 1)
    side = int(fit.size / fit.crop_pct)
    size = [side] if fit.resize == "crop" else [side, side]
    expected = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
            transforms.CenterCrop(fit.size),
        ]
    )(image)
    found = to_uint8(image, fit)[0]
    assert (found.int() - expected.int()).abs().max() <= 1


def test_as_timm_does():
    from timm.data import create_transform

    for fit, mode in ((Fit(32, "crop", 0.875), "center"), (Fit(32, "squash", 0.875), "squash")):
        image = photo(60, 80)
        config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": mode}
        reference = create_transform(**config, mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(image)) * 255
        assert (to_uint8(image, fit)[0].float() - reference).abs().mean() < 2


def test_as_transformers_does():
    transformers = pytest.importorskip("transformers")
    image = photo(60, 80)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3, do_normalize=False)
    reference = torch.as_tensor(np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]))
    assert (to_uint8(image, Fit(32, "squash"))[0].float() - 255 * reference).abs().mean() < 2
    assert (to_uint8(image, 32)[0].float() - 255 * reference).abs().mean() > 4


def test_images_of_that_size_are_taken_as_they_are():
    image = photo(32, 32)
    for fit in (Fit(32, "crop", 0.5), Fit(32, "squash"), 32):
        assert np.array_equal(to_uint8(image, fit)[0].permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (Fit(0), "`size` must be at least 1, got 0"),
        (Fit(8, "pad"), "`resize` must be 'crop' or 'squash', got 'pad'"),
        (Fit(8, "crop", 0.0), "`crop_pct` must be from 0.1 to 1, got 0.0"),
        (Fit(8, "crop", float("nan")), "`crop_pct` must be from 0.1 to 1, got nan"),
    ],
)
def test_fits_that_cannot_be(fit, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(photo(9, 9), fit)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30), (200, 90), (32, 70)], ids=str)
@pytest.mark.parametrize("fit", [Fit(32), Fit(32, "squash"), Fit(32, "crop", 0.875), Fit(32, "squash", 0.9)], ids=str)
def test_the_session_prepares_alike(shape, fit):
    pixels = pytest.importorskip("lorarecycle.export.pixels")
    image = photo(*shape)
    ours = to_uint8(image, fit)[0].numpy().astype(int)
    (theirs,) = pixels.to_batches([image], fit.size, 1, resize=fit.resize, crop_pct=fit.crop_pct)
    assert np.abs(theirs[0].astype(int) - ours).max() <= 2


def test_one_number_in_a_file_an_image_and_an_array(tmp_path):
    """Pillow's mode I and the same numbers in numpy: one reader."""
    values = np.array([[0, 300], [65535, 1000]], dtype=np.int32)
    deep = Image.fromarray(values.astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    from_file, from_image = to_uint8(tmp_path / "deep.png", 2), to_uint8(deep, 2)
    assert torch.equal(from_file, from_image)
    assert torch.equal(from_file, to_uint8(values.astype(np.uint16), 2))
    for wide in (values, Image.fromarray(values, mode="I") if hasattr(Image, "fromarray") else values):
        with pytest.raises(ValueError, match=r"must hold integers 0 to 255 .*got int32 0 to 65535"):
            to_uint8(wide, 2)
