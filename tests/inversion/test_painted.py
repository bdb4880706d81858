"""Random images of shapes: range, seeds, and statistics of natural images."""

import pytest
import torch

from lorarecycle import InversionConfig
from lorarecycle.inversion.painted import paint_pictures
from lorarecycle.inversion.pictures import PAINTED_TOGETHER, painted_sides, painted_surrogate
from lorarecycle.inversion.start import to_pixels
from lorarecycle.runtime.seeds import stream


def draw(n: int = 64, size: int = 32, seed: int = 0) -> torch.Tensor:
    return paint_pictures(n, size, torch.Generator().manual_seed(seed))


@pytest.mark.medium
def test_images_are_in_range_and_follow_the_seed():
    images = draw()
    assert images.shape == (64, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, draw())
    assert not torch.equal(images, draw(seed=1))


@pytest.mark.medium
def test_statistics_are_those_of_natural_images():
    images = draw(256)
    assert 0.4 < images.mean() < 0.6
    assert 0.2 < images.std() < 0.35
    flat = images.transpose(0, 1).flatten(1)
    assert torch.corrcoef(flat)[0, 2] > 0.6  # channels go together
    spectrum = torch.fft.rfft2(images - images.mean(dim=(2, 3), keepdim=True)).abs().square().mean(dim=(0, 1))
    slope = (spectrum[0, 10].log() - spectrum[0, 2].log()) / torch.tensor(5.0).log()
    assert -4.5 < slope < -1.5  # power falls with frequency, about 1/f^2 to 1/f^3


@pytest.mark.medium
def test_a_third_each_has_the_pixels_of_small_photographs(tiny_backbone):
    config = InversionConfig(pictures=3 * PAINTED_TOGETHER, image_size=80)
    assert painted_sides(config, 80) == (80, 32, 64)
    assert painted_sides(config, 32) == (32,)
    assert painted_sides(InversionConfig(latent_size=40), 80) == (40,)
    images = painted_surrogate(tiny_backbone, config, seed=0, quiet=True).images
    for i, side in enumerate((80, 32, 64)):
        painted = to_pixels(paint_pictures(PAINTED_TOGETHER, side, stream(0, "pictures", i)), 80)
        assert torch.equal(images.split(PAINTED_TOGETHER)[i], painted)
