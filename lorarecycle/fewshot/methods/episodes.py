"""Few-shot episodes over the classes of all surrogates, for methods that train on tasks beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data.dataset import LabelledImages
from ...data.names import pooled_names
from ...inversion.surrogate import Surrogate


def pool_classes(surrogates: Sequence[Surrogate]) -> LabelledImages:
    """The images of all surrogates as one labelled set; its classes are those of `pooled_names`."""
    names = pooled_names([surrogate.class_names for surrogate in surrogates])
    number = {name: i for i, name in enumerate(dict.fromkeys(name for own in names for name in own))}
    labels = []
    for surrogate, own in zip(surrogates, names, strict=True):
        assert surrogate.labels is not None  # checked
        labels.append(torch.tensor([number[name] for name in own])[surrogate.labels])
    return LabelledImages(torch.cat([s.images for s in surrogates]), torch.cat(labels), tuple(number))


class EpisodeDraw:
    """Draws support and queries of classes, each time others.

    Args:
        labels: int64 [n].
        n_way, n_shot, n_query: of an episode; fewer queries where a class has not as many images.

    Raises:
        ValueError: fewer classes, or fewer images of a class than `n_shot + 1`.
    """

    def __init__(self, labels: Tensor, n_way: int, n_shot: int, n_query: int) -> None:
        self.members: list[Tensor] = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
        fewest = min(map(len, self.members))
        if len(self.members) < n_way or fewest < n_shot + 1:
            raise ValueError(
                f"`surrogates` must hold {n_way} classes of at least {n_shot + 1} images, got {len(self.members)} "
                f"classes of at least {fewest}."
            )
        self.n_way = n_way
        self.n_shot = n_shot
        self.n_query: int = min(n_query, fewest - n_shot)

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support [S], its labels 0 to C - 1, queries [Q], their labels; class after class."""
        chosen = torch.randperm(len(self.members), generator=generator)[: self.n_way].tolist()
        need = self.n_shot + self.n_query
        rows = torch.stack(
            [self.members[c][torch.randperm(len(self.members[c]), generator=generator)[:need]] for c in chosen]
        )
        ways = torch.arange(self.n_way)
        support, query = rows[:, : self.n_shot].flatten(), rows[:, self.n_shot :].flatten()
        return support, ways.repeat_interleave(self.n_shot), query, ways.repeat_interleave(self.n_query)
