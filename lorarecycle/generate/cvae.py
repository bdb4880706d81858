"""The conditional variational autoencoder over flat adapters (ICM-LoRA, Sec. 3.3 and Training Strategies)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Posterior(NamedTuple):
    """q(z | l, v) = N(mean, exp(log_variance)) (Eq. 3), both [B, latent]."""

    mean: Tensor
    log_variance: Tensor


def channel_plan(conv_layers: int) -> tuple[int, ...]:
    """Channels of the encoder: 8, 16, 32, 64, 128, 256 and back, for 12 layers; 256 repeats in deeper ones.

    Args:
        conv_layers: number of layers; each halves the length.
    """
    return tuple(min(8 * 2 ** min(i, conv_layers - 1 - i), 256) for i in range(conv_layers))


class CVAE(nn.Module):
    """A convolutional autoencoder of vectors, conditioned on task vectors.

    Encoder: strided Conv1d with batch norm and leaky ReLU, a linear layer to the latent width, the condition
    concatenated, mean and log-variance. Decoder: the mirror image with transposed convolutions, batch norm and ELU.

    Args:
        length: of the vectors; a multiple of `2 ** len(channels)`.
        width: of the task vectors.
        channels: of the encoder's layers.
        kernel: odd width of every convolution.
        latent: width of z.
    """

    def __init__(self, length: int, width: int, channels: tuple[int, ...], kernel: int, latent: int) -> None:
        super().__init__()
        assert length % 2 ** len(channels) == 0
        assert kernel % 2 == 1
        self.latent = latent
        self.coarse: tuple[int, int] = (channels[-1], length // 2 ** len(channels))
        features = self.coarse[0] * self.coarse[1]
        pad = kernel // 2
        layers: list[nn.Module] = []
        for before, after in zip((1, *channels), channels, strict=False):
            layers += [nn.Conv1d(before, after, kernel, 2, pad), nn.BatchNorm1d(after), nn.LeakyReLU()]
        self.encoder: nn.Module = nn.Sequential(*layers)
        self.to_latent: nn.Module = nn.Linear(features, latent)
        self.to_mean: nn.Module = nn.Linear(latent + width, latent)
        self.to_log_variance: nn.Module = nn.Linear(latent + width, latent)
        self.from_latent: nn.Module = nn.Linear(latent + width, features)
        layers = []
        mirrored = channels[::-1]
        for before, after in zip(mirrored, (*mirrored[1:], 1), strict=True):
            layers += [nn.ConvTranspose1d(before, after, kernel, 2, pad, output_padding=1)]
            layers += [nn.BatchNorm1d(after), nn.ELU()]
        self.decoder: nn.Module = nn.Sequential(*layers[:-2])  # the last layer's output is the vector itself

    def encode(self, vectors: Tensor, conditions: Tensor) -> Posterior:
        """The posterior of vectors [B, length] under conditions [B, width] (Eq. 2, 3)."""
        hidden = self.to_latent(self.encoder(vectors[:, None]).flatten(1))
        hidden = torch.cat([hidden, conditions], dim=1)
        return Posterior(self.to_mean(hidden), self.to_log_variance(hidden))

    def decode(self, z: Tensor, conditions: Tensor) -> Tensor:
        """Vectors [B, length] from latents [B, latent] under conditions [B, width] (Eq. 5, 6)."""
        hidden = self.from_latent(torch.cat([z, conditions], dim=1))
        return self.decoder(hidden.unflatten(1, self.coarse))[:, 0]
