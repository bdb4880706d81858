"""What each process computes of a meta-training step: whole episodes, or images where no episode needs all of them."""

from __future__ import annotations

from typing import NamedTuple

from ..config import MetaConfig
from ..runtime.distributed import Group
from .draws import Draws


class Share(NamedTuple):
    """One forward and backward pass of a process in every step."""

    draws: Draws
    """with a row for each step"""
    weight: float
    """share of its mean loss in the loss of the step"""


def own_shares(draws: Draws, config: MetaConfig, group: Group) -> list[Share]:
    """The passes of this process, in every step; together with those of the others they are the step's loss.

    The loss of a step is the mean over `episodes_per_step` episodes. They are dealt out one by one; where only the
    guide counts (`guide_weight=1`) each image has its own share of the loss, and all images of a step are dealt out
    evenly.

    Args:
        draws: a row for each episode, `episodes_per_step` to a step.
        config: settings.
        group: the processes.
    """
    E = config.episodes_per_step
    if config.guide_weight < 1:
        return [Share(Draws(*(table[e::E] for table in draws)), 1 / E) for e in range(group.rank, E, group.size)]
    width = draws.rows.shape[1]
    first, last = group.own(E * width)
    shares = []
    for start in range(first, last, max(width, 1)):  # no width: all steps are done
        stop = min(start + width, last)
        own = Draws(
            draws.rows.reshape(-1, E * width)[:, start:stop],
            draws.mirrored.reshape(-1, E * width)[:, start:stop],
            draws.resolution.reshape(-1, E * width)[:, start:stop],
            draws.teacher_classes[::E],
            draws.cross_task[::E],
        )
        shares.append(Share(own, (stop - start) / (E * width)))
    return shares
