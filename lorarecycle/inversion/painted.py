"""Random pictures of one object on a background, painted from shapes: to train on, or to start inversion from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = 8
"""Most parts of a thing: a large one and others around it."""
CLUTTER = 4
"""Shapes that lie on a ground which is neither white nor even."""
FINE = 96
"""Images smaller than this are painted at twice their size, for edges finer than a pixel."""
AXES = ((1.0, 1.0, 1.0), (0.4, 0.06, -0.46), (0.18, -0.22, 0.04))
"""Directions in which colours of natural images vary: light and dark, blue and yellow, red and green."""


def paint_pictures(n: int, size: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Paint random images whose statistics are close to those of photographs.

    Each shows one object on a background. The object has up to `PARTS` shaded parts of one palette. The background is
    white, of one colour, or textured with `CLUTTER` shapes. Shapes cover one another, as in the "dead leaves" model of
    natural images (Lee, Mumford and Huang 2001). No image is read, and nothing is learnt.

    Args:
        n: images.
        size: side in pixels.
        generator: randomness, on the CPU: the pictures are the same, within rounding, wherever they are painted.
        device: where they are painted.

    Returns:
        float32 [n, 3, size, size] in [0, 1], on that device.
    """
    fine = 2 if size < FINE else 1
    paint = _Painter(n, fine * size, generator, torch.device(device))
    images = paint.thing(paint.ground())
    return F.avg_pool2d(images.clamp(0, 1), fine)


class _Painter:
    """Draws for `n` images at once; a kind in [0, 1) for each decides about its ground."""

    def __init__(self, n: int, size: int, generator: torch.Generator, device: torch.device) -> None:
        self.n, self.size, self.generator, self.device = n, size, generator, device
        self.axes = torch.tensor(AXES, device=device)
        side = torch.linspace(-1, 1, size, device=device)
        self.y, self.x = side[:, None].expand(size, size), side[None, :].expand(size, size)
        self.rough, self.smooth = self._clouds(0.8 + 0.6 * self.uniform()), self._clouds(1.3 + 0.5 * self.uniform())
        self.kind = self.uniform()
        self.white, self.even = self.kind < 0.28, self.kind < 0.45

    def ground(self) -> Tensor:
        """White, even with a slope of light, or textured with a horizon and clutter, [n, 3, size, size]."""
        white = 0.97 - 0.1 * self.uniform().square() + 0.02 * self.normal(3)
        colour = 0.5 + self.colour(0.24)
        slope = 0.15 * (self.normal() * self.y + self.normal() * self.x)
        busy = self.fill(colour)
        level = self.y - 0.5 * self.normal() - 0.1 * self.normal() * self.x
        below = torch.sigmoid(level / 0.02) * (self.uniform() < 0.5)
        busy = torch.lerp(busy, self.fill(0.45 + self.colour(0.22)), below)
        for _ in range(CLUTTER):
            centre = (2 * self.uniform() - 1, 2 * self.uniform() - 1)
            radius, soft = 0.08 + 0.5 * self.uniform().square(), 0.02 + 0.1 * self.uniform()
            cover, shade = self.shape(centre, radius, torch.exp(0.5 * self.normal()), soft)
            busy = torch.lerp(busy, self.fill(colour + self.colour(0.17)) + shade, cover)
        return torch.where(self.white, white, torch.where(self.even, colour + slope, busy))

    def thing(self, images: Tensor) -> Tensor:
        """The images with a thing near their centre."""
        hue = 0.45 + self.colour(0.24) - 0.15 * self.white
        x, y, radius = 0.25 * self.normal(), 0.2 * self.normal(), 0.35 + 0.35 * self.uniform()
        parts = torch.randint(1, PARTS + 1, (self.n, 1, 1, 1), generator=self.generator).to(self.device)
        for i in range(PARTS):
            if i == 0:
                centre, size, stretch = (x, y), radius * (0.7 + 0.5 * self.uniform()), 0.3
                colour = hue + self.colour(0.05)
            else:
                away, angle = radius * (0.3 + 0.9 * self.uniform()), 2 * math.pi * self.uniform()
                centre = (x + away * angle.cos(), y + away * angle.sin())
                size, stretch = radius * (0.1 + 0.5 * self.uniform()), 0.7
                colour = hue + self.colour(0.05 + 0.22 * self.uniform())
            soft = 0.015 + 0.04 * self.uniform()
            cover, shade = self.shape(centre, size, torch.exp(stretch * self.normal()), soft)
            images = torch.lerp(images, self.fill(colour) + shade, cover * (parts > i))
        return images

    def fill(self, colour: Tensor) -> Tensor:
        """The colour with a slope of light, clouds, and stripes on every third image, [n, 3, size, size]."""
        slope = 0.15 * (self.normal() * self.y + self.normal() * self.x)
        clouds = torch.where(self.uniform() < 0.5, self.rough, self.smooth) * (0.02 + 0.15 * self.uniform() ** 1.5)
        angle, frequency = math.pi * self.uniform(), 3 + 12 * self.uniform()
        across = self.x * angle.cos() + self.y * angle.sin() + 0.15 * self.normal() * self.smooth[:, :1]
        stripes = torch.tanh(3 * torch.sin(frequency * across + 2 * math.pi * self.uniform()))
        depth = 0.12 * self.uniform() * (self.uniform() < 0.35) * torch.sign(self.normal())
        return colour + slope + clouds + depth * stripes

    def shape(
        self, centre: tuple[Tensor, Tensor], radius: Tensor, stretch: Tensor, soft: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How much of each pixel it covers, and its shade: between an ellipse and a box, its outline uneven."""
        angle = math.pi * self.uniform()
        dx, dy = self.x - centre[0], self.y - centre[1]
        u = (dx * angle.cos() + dy * angle.sin()) / (radius * stretch)
        v = (dy * angle.cos() - dx * angle.sin()) / (radius / stretch)
        power = 2 + 6 * self.uniform().square()  # 2: an ellipse; 8: nearly a box
        outline = (u.abs() ** power + v.abs() ** power + 1e-6) ** (1 / power)
        cover = torch.sigmoid((1 - outline - 0.12 * self.uniform() * self.smooth[:, :1]) / soft)
        shade = -0.22 * self.uniform() * (v + 0.3 * u) - 0.12 * self.uniform() * outline.square()
        return cover, shade.clamp(-0.5, 0.5)

    def uniform(self) -> Tensor:
        """One number for each image, [n, 1, 1, 1]."""
        return torch.rand(self.n, 1, 1, 1, generator=self.generator).to(self.device)

    def normal(self, channels: int = 1) -> Tensor:
        return torch.randn(self.n, channels, 1, 1, generator=self.generator).to(self.device)

    def colour(self, spread: float | Tensor) -> Tensor:
        """A shift of colour for each image, [n, 3, 1, 1]."""
        return spread * torch.einsum("nakl,ac->nckl", self.normal(3), self.axes)

    def _clouds(self, power: Tensor) -> Tensor:
        """Noise with a spectrum of 1/f^power and unit deviation, mostly grey, [n, 3, size, size]."""
        fy = torch.fft.fftfreq(self.size, device=self.device)[:, None]
        fx = torch.fft.rfftfreq(self.size, device=self.device)[None, :]
        spectrum = (fy.square() + fx.square()).clamp_min(1 / self.size**2) ** (-power / 2)
        spectrum[..., 0, 0] = 0
        noise = torch.randn(self.n, 4, self.size, self.size, generator=self.generator).to(self.device)
        noise = torch.fft.irfft2(torch.fft.rfft2(noise) * spectrum, s=(self.size, self.size))
        noise = 0.5 * noise[:, :3] + 0.85 * noise[:, 3:]
        return noise / noise.std(dim=(1, 2, 3), keepdim=True)
