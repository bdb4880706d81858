"""Images as photographs of fewer pixels show them: the matrix does what resizing does."""

import pytest
import torch
from torch.nn.functional import interpolate

from lorarecycle.data.resolution import resample, resampling


@pytest.mark.parametrize(("size", "side"), [(32, 8), (33, 7), (64, 48)])
def test_the_matrix_is_resizing_twice(size, side):
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    less = interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True)
    expected = interpolate(less, size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    seen = resample(images, resampling(size, side).expand(2, -1, -1))
    assert seen.dtype == torch.uint8
    assert (seen.float() - expected).abs().max() <= 1  # where rounding falls on either side


def test_each_image_has_its_own_resolution():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    seen = resample(images, torch.stack([resampling(32, 40), resampling(32, 8)]))
    assert torch.equal(seen[0], images[0])
    assert not torch.equal(seen[1], images[1])
