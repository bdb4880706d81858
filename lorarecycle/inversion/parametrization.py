"""What Adam changes when images are optimised: normalised pixels, pixels, or Fourier coefficients of colours."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.images import of_channels
from ..vit.backbone import Backbone

COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
"""Columns: directions in which the colours of natural images vary, by how much (Olah et al. 2017)."""
DARKEST = 0.02
"""Pixels nearer to black or white than this are taken as that far away, where a sigmoid has to reach them."""


class NormalizedPixels:
    """The paper's: the images themselves, as the backbone reads them; clipped to what pixels can be (Eq. 1).

    Args:
        teacher: gives normalisation and device.
        batch_size, size: images, and their side in pixels.
    """

    def __init__(self, teacher: Backbone, batch_size: int, size: int) -> None:
        self.mean: Tensor = of_channels(teacher.mean, teacher.device)
        self.std: Tensor = of_channels(teacher.std, teacher.device)
        self.variable: Tensor = torch.zeros(batch_size, 3, size, size, device=teacher.device).requires_grad_()
        self.low: Tensor = -self.mean / self.std
        self.high: Tensor = (1 - self.mean) / self.std

    def set(self, images: Tensor) -> None:
        """Start from these, float32 [B, 3, s, s], normalised."""
        with torch.no_grad():
            self.variable.copy_(images)

    def images(self) -> Tensor:
        """The images now, normalised, float32 [B, 3, s, s]."""
        return self.variable

    def clip(self) -> None:
        """Bring the variable back to where it stands for images, after a step."""
        with torch.no_grad():
            self.variable.clamp_(self.low, self.high)


class Pixels(NormalizedPixels):
    """Pixels in [0, 1], so that a learning rate means the same whatever the backbone's normalisation."""

    def set(self, images: Tensor) -> None:
        with torch.no_grad():
            self.variable.copy_(images * self.std + self.mean)

    def images(self) -> Tensor:
        return (self.variable - self.mean) / self.std

    def clip(self) -> None:
        with torch.no_grad():
            self.variable.clamp_(0, 1)


class Fourier(NormalizedPixels):
    """Fourier coefficients of decorrelated colours, each in units of what its frequency has in natural images.

    With c the coefficients, f their frequencies and C the colours' directions::

        pixels = sigmoid(C irfft2(c / max(f, 1 / s)))

    so that one step of Adam moves the coarse parts of an image far and the fine ones little: images are smooth by
    construction (Olah et al. 2017, Feature Visualization). The weights of the frequencies are brought to a mean square
    of 1: a step of `lr` moves the sigmoid's argument by about `lr`.
    """

    def __init__(self, teacher: Backbone, batch_size: int, size: int) -> None:
        super().__init__(teacher, batch_size, size)
        device = teacher.device
        colours = torch.tensor(COLOURS, device=device)
        self.colours: Tensor = colours / colours.norm(dim=1).max()
        self.uncoloured: Tensor = torch.linalg.inv(self.colours.cpu()).to(device)
        down, across = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
        weights = 1 / (down.square() + across.square()).sqrt().clamp_min(1 / size)
        self.weights: Tensor = (weights / weights.square().mean().sqrt()).to(device)
        self.size = size
        self.variable = torch.zeros(batch_size, 3, size, size // 2 + 1, 2, device=device).requires_grad_()

    def set(self, images: Tensor) -> None:
        pixels = (images * self.std + self.mean).clamp(DARKEST, 1 - DARKEST)
        signal = torch.einsum("dc,bchw->bdhw", self.uncoloured, pixels.logit())
        with torch.no_grad():
            self.variable.copy_(torch.view_as_real(torch.fft.rfft2(signal, norm="ortho") / self.weights))

    def images(self) -> Tensor:
        spectrum = torch.view_as_complex(self.variable) * self.weights
        signal = torch.fft.irfft2(spectrum, s=(self.size, self.size), norm="ortho")
        pixels = torch.einsum("cd,bdhw->bchw", self.colours, signal).sigmoid()
        return (pixels - self.mean) / self.std

    def clip(self) -> None:
        pass


PARAMETRIZATIONS = {"normalized": NormalizedPixels, "pixels": Pixels, "fourier": Fourier}
