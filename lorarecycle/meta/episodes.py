"""Seeded few-shot episodes over labelled images, within one adapter or across several (Sec. 4.1, 4.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import MetaConfig
from ..data.names import pooled_names
from ..inversion.surrogate import Surrogate
from ..runtime.seeds import stream


class Episode(NamedTuple):
    """One few-shot task: indices into the pooled images, support first."""

    images: Tensor
    """int64 [n_way * (n_shot + n_query)]"""
    labels: Tensor
    """int64, as long as `images`: class of the episode, 0 to n_way - 1"""
    teacher_classes: Tensor
    """int64 [n_way]: columns of the teacher's logits; meaningless where `cross_task`"""
    cross_task: bool
    """Classes come from different adapters: no teacher knows all of them (Eq. 4)."""


class Layout(NamedTuple):
    """What a sampler has to know of an adapter's images, which need not be there yet."""

    adapter: str
    """name"""
    class_names: tuple[str, ...]
    labels: Tensor | None
    """int64 [n]; None for images that show no class"""
    size: int
    """n"""
    teacher_logits: bool
    """the adapter's own answers are, or will be, there"""

    @classmethod
    def of(cls, surrogate: Surrogate) -> Layout:
        """That of images that are there."""
        answered = surrogate.teacher_logits is not None
        return cls(surrogate.adapter, surrogate.class_names, surrogate.labels, len(surrogate.images), answered)

    @classmethod
    def planned(cls, adapter: str, class_names: tuple[str, ...], per_class: int, *, teacher_logits: bool) -> Layout:
        """That of images which inversion will make."""
        labels = planned_labels(len(class_names), per_class)
        return cls(adapter, class_names, labels, len(labels), teacher_logits)


@lru_cache(maxsize=64)
def planned_labels(n_classes: int, per_class: int) -> Tensor:
    """Labels of the images that inversion makes, int64 [n_classes * per_class]; not to be written to."""
    return torch.arange(n_classes).repeat(per_class)


class EpisodeSampler:
    """Draws episodes; the episode of a step depends on the seed and the step alone.

    Args:
        surrogates: labelled images of each adapter, or their layouts.
        config: n_way, n_shot, n_query, interpolation.
        seed: of all episodes.

    Raises:
        ValueError: too few classes, adapters or images for such episodes.
    """

    def __init__(self, surrogates: Sequence[Surrogate | Layout], config: MetaConfig, seed: int = 0) -> None:
        layouts = [s if isinstance(s, Layout) else Layout.of(s) for s in surrogates]
        class_names = [s.class_names for s in layouts]
        class_counts = [len(names) for names in class_names]
        check_episodes(class_counts, [s.adapter for s in layouts], config, class_names)
        for layout in layouts:
            if not layout.teacher_logits and config.interpolation < 1:
                raise ValueError(
                    f"surrogate of {layout.adapter!r} must hold teacher logits for episodes within its classes, got "
                    "none; make it with teacher_logits=True, or set interpolation=1.0."
                )
        self.config = config
        self.seed = seed
        self.members: list[tuple[int, list[Tensor]]] = []
        """Of each adapter: its first row, and the rows of each class counted from there."""
        known: dict[tuple[int, int], list[Tensor]] = {}  # adapters of equal labels share them
        offset = 0
        for layout in layouts:
            assert layout.labels is not None  # it has classes
            key = (id(layout.labels), len(layout.class_names))
            if key not in known:
                known[key] = [(layout.labels == c).nonzero()[:, 0] for c in range(len(layout.class_names))]
            for name, row in zip(layout.class_names, known[key], strict=True):
                if len(row) < config.n_shot + config.n_query:
                    raise ValueError(
                        f"`images_per_class` must be at least n_shot + n_query = {config.n_shot + config.n_query}, got "
                        f"{len(row)} images of class {name!r} of {layout.adapter!r}; in a run's folder are those that "
                        "its episodes drew, all of them with images='all'."
                    )
            self.members.append((offset, known[key]))
            offset += layout.size
        self.classes: list[tuple[int, int]] = [(i, c) for i, count in enumerate(class_counts) for c in range(count)]
        self.meanings: list[str] = list(itertools.chain.from_iterable(pooled_names(class_names)))

    def __call__(self, step: int) -> Episode:
        """The episode of a step."""
        config = self.config
        generator = stream(self.seed, "episode", step)
        cross_task = bool(torch.rand((), generator=generator) < config.interpolation)
        if cross_task:
            chosen = self._cross_task_classes(generator)
        else:
            adapter = int(torch.randint(len(self.members), (), generator=generator))
            order = torch.randperm(len(self.members[adapter][1]), generator=generator)[: config.n_way]
            chosen = [(adapter, int(c)) for c in order]
        per_class = config.n_shot + config.n_query
        drawn = []
        for adapter, c in chosen:
            offset, own = self.members[adapter]
            drawn.append(offset + own[c][torch.randperm(len(own[c]), generator=generator)[:per_class]])
        rows = torch.stack(drawn)  # [n_way, n_shot + n_query]
        images = torch.cat([rows[:, : config.n_shot].flatten(), rows[:, config.n_shot :].flatten()])
        ways = torch.arange(config.n_way)
        labels = torch.cat([ways.repeat_interleave(config.n_shot), ways.repeat_interleave(config.n_query)])
        return Episode(images, labels, torch.tensor([c for _, c in chosen]), cross_task)

    def _cross_task_classes(self, generator: torch.Generator) -> list[tuple[int, int]]:
        """`n_way` different classes from at least two adapters, no two of one name."""
        while True:
            chosen: dict[object, tuple[int, int]] = {}
            for i in torch.randperm(len(self.classes), generator=generator).tolist():
                chosen.setdefault(self.meanings[i], self.classes[i])
                if len(chosen) == self.config.n_way:
                    break
            if len({adapter for adapter, _ in chosen.values()}) > 1:
                return list(chosen.values())


class ImageSampler:
    """Draws images for steps that look at no label, as many as an episode has; those of a step depend on the seed and
    the step alone.

    Args:
        surrogates: any images, or their layouts.
        config: n_way, n_shot, n_query: their number is `n_way * (n_shot + n_query)`, or all there are.
        seed: of all draws.

    Raises:
        ValueError: no images.
    """

    def __init__(self, surrogates: Sequence[Surrogate | Layout], config: MetaConfig, seed: int = 0) -> None:
        self.total: int = sum(s.size if isinstance(s, Layout) else len(s.images) for s in surrogates)
        if not self.total:
            raise ValueError("`surrogates` must hold at least one image, got none.")
        self.count: int = min(self.total, config.n_way * (config.n_shot + config.n_query))
        self.seed = seed

    def __call__(self, step: int) -> Episode:
        """The images of a step; labels and teacher classes are empty."""
        rows = torch.randperm(self.total, generator=stream(self.seed, "episode", step))[: self.count]
        none = torch.empty(0, dtype=torch.int64)
        return Episode(rows, none, none, cross_task=False)


def check_episodes(
    class_counts: Sequence[int],
    names: Sequence[str],
    config: MetaConfig,
    class_names: Sequence[Sequence[str]] | None = None,
) -> None:
    """Make sure that episodes can be drawn from adapters with so many classes each.

    Args:
        class_counts, names: of the adapters.
        config: n_way, interpolation.
        class_names: of each adapter's classes; all different when None.

    Raises:
        ValueError: fewer classes than `n_way`, or one adapter only where episodes should cross adapters; classes of one
            name count once across adapters.
    """
    if not class_counts:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    if config.interpolation < 1:
        for count, name in zip(class_counts, names, strict=True):
            if count < config.n_way:
                raise ValueError(
                    f"`n_way` must be at most the classes of every adapter, got n_way={config.n_way} and {count} "
                    f"classes in {name!r}; lower n_way, or set interpolation=1.0 to draw classes across adapters only."
                )
    if config.interpolation > 0:
        if len(class_counts) < 2:
            raise ValueError(
                f"`interpolation` must be 0 with a single adapter, got {config.interpolation}: there is no second one "
                "to mix classes with."
            )
        named = itertools.chain.from_iterable(pooled_names(class_names or ()))
        different = sum(class_counts) if class_names is None else len(set(named))
        if different < config.n_way:
            raise ValueError(
                f"`n_way` must be at most the classes of all adapters together ({different}, those of one name counted "
                f"once), got {config.n_way}."
            )
