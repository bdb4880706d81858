"""What every step of meta-training draws, drawn beforehand: tables on the device, indexed by a counter there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MetaConfig
from ..runtime.seeds import stream
from .episodes import Episode


class Draw(NamedTuple):
    """What one episode draws."""

    rows: Tensor
    """int64 [n], images of the bank: the support, class after class, then the queries."""
    mirrored: Tensor
    """bool [n], images that are seen mirrored."""
    resolution: Tensor
    """int64 [n], which of `config.resolutions` each image is seen at; 0 where there are none."""
    teacher_classes: Tensor
    """int64 [n_way], columns of the teacher's logits; 0 where no teacher counts."""
    cross_task: Tensor
    """bool scalar: no teacher knows all classes (Eq. 4)."""


class Draws(NamedTuple):
    """The draws of all episodes, or of one in each step, one above the other."""

    rows: Tensor
    mirrored: Tensor
    resolution: Tensor
    teacher_classes: Tensor
    cross_task: Tensor

    @classmethod
    def of(
        cls, draw: Callable[[int], Episode], config: MetaConfig, seed: int, *, first: int, device: torch.device
    ) -> Draws:
        """Draw beforehand.

        Args:
            draw: the episode of a number; those of step s have the numbers from `s * episodes_per_step` on.
            config: `steps`, `episodes_per_step`, `n_way`, `flip`, `resolutions`.
            seed: of the flips and the resolutions.
            first: step to begin at; what comes before it is left zero.
            device: where the tables are wanted.
        """
        total = config.steps * config.episodes_per_step
        steps = range(first * config.episodes_per_step, total)
        episodes = [draw(step) for step in steps]
        width = len(episodes[0].images) if episodes else 0
        classes = torch.zeros(total, config.n_way, dtype=torch.int64)
        rows = torch.zeros(total, width, dtype=torch.int64)
        mirrored = torch.zeros(total, width, dtype=torch.bool)
        resolution = torch.zeros_like(rows)
        cross_task = torch.zeros(total, dtype=torch.bool)
        for step, episode in zip(steps, episodes, strict=True):
            rows[step], cross_task[step] = episode.images, episode.cross_task
            if config.flip:
                mirrored[step] = torch.rand(width, generator=stream(seed, "flip", step)) < 0.5
            if config.resolutions:
                own = stream(seed, "resolution", step)
                resolution[step] = torch.randint(len(config.resolutions), (width,), generator=own)
            if len(episode.teacher_classes) and not episode.cross_task:
                classes[step] = episode.teacher_classes
        return cls(*(table.to(device) for table in (rows, mirrored, resolution, classes, cross_task)))

    def at(self, step: Tensor) -> Draw:
        """The draw of a step, int64 [1] on the device: it is not read by the host."""
        return Draw(*(table.index_select(0, step)[0] for table in self))
