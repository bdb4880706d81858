"""Random images of overlapping shapes with the statistics of natural ones: where inversion can start from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = 16
"""Painted over each other, back to front; the last two are large and central, as photographed objects are."""
AXES = ((1.0, 1.0, 1.0), (0.4, 0.06, -0.46), (0.18, -0.22, 0.04))
"""Directions in which colours of natural images vary: light and dark, blue and yellow, red and green."""


def draw_shapes(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Paint images: ellipses and boxes of all sizes hide one another ("dead leaves", Lee, Mumford and Huang 2001).

    Each has a colour of the image's palette, a shade that runs across it, and a cloudy texture of 1/f spectrum.

    Args:
        n: images.
        size: side in pixels.
        generator: randomness, on the CPU.

    Returns:
        float32 [n, 3, size, size] in [0, 1], on the CPU.
    """
    paint = _Painter(n, size, generator)
    images = paint.fill()
    for i in range(SHAPES):
        u, v, cover = paint.shape(central=i >= SHAPES - 2)
        shade = paint.normal(1) * 0.12 * (u + v).clamp(-2, 2)
        images = torch.lerp(images, paint.fill() + shade, cover)
    return images.clamp(0, 1)


class _Painter:
    """Draws for `n` images at once."""

    def __init__(self, n: int, size: int, generator: torch.Generator) -> None:
        self.n, self.size, self.generator = n, size, generator
        side = torch.linspace(-1, 1, size)
        self.y, self.x = side[:, None], side[None, :]
        self.mean = 0.48 + self.colour(0.2)
        self.contrast = 0.08 + 0.22 * self.uniform()
        self.clouds = self._clouds()

    def uniform(self) -> Tensor:
        """One number for each image, [n, 1, 1, 1]."""
        return torch.rand(self.n, 1, 1, 1, generator=self.generator)

    def normal(self, channels: int) -> Tensor:
        return torch.randn(self.n, channels, 1, 1, generator=self.generator)

    def colour(self, spread: float | Tensor) -> Tensor:
        """A shift of colour for each image, [n, 3, 1, 1]."""
        return spread * torch.einsum("nakl,ac->nckl", self.normal(3), torch.tensor(AXES))

    def fill(self) -> Tensor:
        """Colour of the palette, slope and texture, [n, 3, size, size]."""
        slope = 0.12 * self.uniform() * (self.normal(1) * self.y + self.normal(1) * self.x)
        shift = torch.randint(self.size, (2,), generator=self.generator).tolist()
        clouds = self.clouds.roll(shift, dims=(2, 3)) * (0.12 * self.uniform().square())
        return self.mean + self.colour(self.contrast) + slope + clouds

    def shape(self, *, central: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates along its axes in units of its radii, and how much it covers each pixel, all [n, 1, H, W]."""
        if central:
            radius, reach = 0.25 + 0.4 * self.uniform(), 0.35
        else:
            radius, reach = 0.08 + 0.9 * self.uniform() ** 2.5, 1.0
        stretch, angle = torch.exp(0.25 * self.normal(1)), math.pi * self.uniform()
        dx = self.x - reach * (2 * self.uniform() - 1)
        dy = self.y - reach * (2 * self.uniform() - 1)
        u = (dx * angle.cos() + dy * angle.sin()) / (radius * stretch)
        v = (dy * angle.cos() - dx * angle.sin()) / (radius / stretch)
        box = self.uniform()  # 0: an ellipse, 1: a box
        outline = torch.lerp(torch.hypot(u, v), torch.maximum(u.abs(), v.abs()), box)
        softness = 0.06 + 0.15 * self.uniform() ** 3
        return u, v, torch.sigmoid((1 - outline) / softness)

    def _clouds(self) -> Tensor:
        """Noise with a 1/f spectrum and unit deviation, partly grey, [n, 3, size, size]."""
        fy, fx = torch.fft.fftfreq(self.size)[:, None], torch.fft.rfftfreq(self.size)[None, :]
        spectrum = torch.rsqrt((fy.square() + fx.square()).clamp_min(1 / self.size**2))
        spectrum[0, 0] = 0
        noise = torch.randn(self.n, 4, self.size, self.size, generator=self.generator)
        noise = torch.fft.irfft2(torch.fft.rfft2(noise) * spectrum, s=(self.size, self.size))
        noise = 0.6 * noise[:, :3] + 0.8 * noise[:, 3:]
        return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Images at `size` pixels, bicubic and differentiable; the same tensor where the size is that already."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
