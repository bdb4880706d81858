"""Which images meta-training will draw, known before any is made: only those are made and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MetaConfig
from .episodes import Episode, EpisodeSampler, ImageSampler, Layout


class DrawnImages(NamedTuple):
    """The draws of a training over the images of all adapters side by side, made or not."""

    episodes: Callable[[int], Episode]
    """Episode of a number, see `EpisodeSampler`; its rows count all images."""
    rows: Tensor
    """int64 [n], the images that are made: those that any episode draws, or all; ascending"""
    offsets: tuple[int, ...]
    """first row of each adapter, and the number of all rows"""

    def __call__(self, number: int) -> Episode:
        """The episode of a number, its rows counted among the images that are made."""
        episode = self.episodes(number)
        return episode._replace(images=torch.searchsorted(self.rows, episode.images))

    def of(self, i: int) -> Tensor:
        """The images of an adapter that are made, int64, counted from its first one, ascending."""
        first, last = torch.searchsorted(self.rows, torch.tensor(self.offsets[i : i + 2])).tolist()
        return self.rows[first:last] - self.offsets[i]

    @property
    def adapters(self) -> list[int]:
        """Those that any image is made of."""
        starts = torch.tensor(self.offsets[1:])
        return torch.bucketize(self.rows, starts, right=True).unique().tolist()

    @property
    def total(self) -> int:
        """Images of all adapters."""
        return self.offsets[-1]


NOTHING_DRAWN = DrawnImages([].__getitem__, torch.empty(0, dtype=torch.int64), (0,))
"""Of a training without steps."""


def find_drawn(layouts: Sequence[Layout], config: MetaConfig, seed: int, *, everything: bool = False) -> DrawnImages:
    """Draw all episodes of a training beforehand.

    Args:
        layouts: of each adapter's images, in order.
        config: settings; `guide_weight=1` draws images without regard to classes.
        seed: of the draws.
        everything: all images are made, drawn or not.

    Raises:
        ValueError: as the samplers do.
    """
    draw = ImageSampler(layouts, config, seed) if config.guide_weight == 1 else EpisodeSampler(layouts, config, seed)
    episodes = [draw(number) for number in range(config.steps * config.episodes_per_step)]
    offsets = [0]
    for layout in layouts:
        offsets.append(offsets[-1] + layout.size)
    rows = torch.arange(offsets[-1]) if everything else torch.cat([each.images for each in episodes]).unique()
    return DrawnImages(episodes.__getitem__, rows, tuple(offsets))


def all_of(draw: EpisodeSampler | ImageSampler, total: int) -> DrawnImages:
    """Draws over images that are all there."""
    return DrawnImages(draw, torch.arange(total), (0, total))
