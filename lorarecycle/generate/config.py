"""Settings of the adapter generators: frozen, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config import _at_least, _between, _not_negative, _one_of, _positive
from .cvae import channel_plan

STEPS, PAPER_EPOCHS = 2500, 2000
"""Of a fit whose number of epochs is not given."""


@dataclass(frozen=True)
class GenerateConfig:
    """ICM-LoRA's conditional variational autoencoder and its training (ICM-LoRA, Training Strategies)."""

    epochs: int | None = None
    """Passes over the adapters. When None, as many as make `STEPS` steps, at most the paper's 2000: generators of 500
    checkpoints had converged by then. And no more than `minutes` allow."""
    minutes: float | None = 60.0
    """Longest fit where `epochs` is None; the first steps are timed. None: no limit."""
    batch_size: int = 8
    """Adapters per step."""
    lr: float = 1e-3
    """Highest learning rate of Adam; it falls to zero along a cosine."""
    conv_layers: int = 12
    """Strided convolutions of the encoder, and transposed ones of the decoder (Tab. 5)."""
    channels: tuple[int, ...] | None = None
    """Channels of the encoder's layers; 8, 16, ... 256 and back to 8 when None."""
    kernel: int = 7
    """Width of the convolutions."""
    latent: int = 256
    """Width of the latent z."""
    kl_weight: float = 0.005
    """Weight of the KL term (summed over z) beside the mean squared error."""
    settle: float = 0.25
    """Share of the steps, at the end, in which batch norm uses its running statistics, as sampling does: those of a
    small batch are others. 0 is the paper's."""
    normalisation: Literal["adapter", "tensor"] = "adapter"
    """One mean and deviation per adapter (the paper's), or per tensor of each adapter."""
    heads: bool = True
    """Generate the heads too, where the adapters have them."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if self.epochs is not None:
            _at_least("epochs", self.epochs, 1)
        if self.minutes is not None:
            _positive("minutes", self.minutes)
        _at_least("batch_size", self.batch_size, 2)
        _positive("lr", self.lr)
        _between("conv_layers", self.conv_layers, 1, 20)  # vectors are padded to a multiple of 2 ** conv_layers
        if self.channels is not None and (len(self.channels) != self.conv_layers or min(self.channels) < 1):
            raise ValueError(
                f"`channels` must be one positive number for each of {self.conv_layers} layers, got {self.channels}."
            )
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd and at least 3, got {self.kernel}.")
        _at_least("latent", self.latent, 1)
        _not_negative("kl_weight", self.kl_weight)
        _between("settle", self.settle, 0, 1)
        _one_of("normalisation", self.normalisation, ("adapter", "tensor"))

    def epochs_of(self, count: int) -> int:
        """Passes over `count` adapters."""
        if self.epochs is not None:
            return self.epochs
        per_epoch = math.ceil(count / min(self.batch_size, count))
        return min(PAPER_EPOCHS, math.ceil(STEPS / per_epoch))

    @property
    def limit(self) -> float | None:
        """Seconds that a fit may take; None: as long as it needs."""
        return None if self.epochs is not None or self.minutes is None else 60 * self.minutes

    @property
    def plan(self) -> tuple[int, ...]:
        """Channels of the encoder's layers."""
        return self.channels or channel_plan(self.conv_layers)


@dataclass(frozen=True)
class SoupConfig:
    """Model soup: adapters averaged parameter by parameter (Wortsman et al., 2022)."""

    recipe: Literal["average", "greedy"] = "average"
    """All of them, or only those that do not lower the score, best first."""
    scope: Literal["all", "task"] = "all"
    """One soup of every adapter, whatever the task vector, or one for each task vector, of its own adapters."""
    heads: bool = True
    """Average the heads too, where the adapters have them."""

    def __post_init__(self) -> None:
        _one_of("recipe", self.recipe, ("average", "greedy"))
        _one_of("scope", self.scope, ("all", "task"))


@dataclass(frozen=True)
class NearestConfig:
    """The adapter with the nearest task vector."""

    heads: bool = True
    """Keep the heads, where the adapters have them."""


@dataclass(frozen=True)
class DiffusionConfig(GenerateConfig):
    """COND P-DIFF: conditional diffusion over the latents of an autoencoder (Jin et al., 2024)."""

    diffusion_steps: int = 1000
    """Noise levels T."""
    diffusion_epochs: int = 2000
    """Passes over the latents, after those of the autoencoder; `minutes` does not limit them."""
    diffusion_batch_size: int = 64
    """Latents per step: they are small, and small batches of them do not learn the noise."""
    hidden: int = 512
    """Width of the denoiser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("diffusion_steps", self.diffusion_steps, 2)
        _at_least("diffusion_epochs", self.diffusion_epochs, 1)
        _at_least("diffusion_batch_size", self.diffusion_batch_size, 1)
        _at_least("hidden", self.hidden, 1)
