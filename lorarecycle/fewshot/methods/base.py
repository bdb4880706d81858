"""The protocol that every few-shot method follows: `prepare` once, then `solve` one task after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from ...adapters.adapter import Adapter
from ...data.images import normalize
from ...inversion.surrogate import Surrogate
from ...vit.backbone import Backbone
from ..images import TaskImages
from ..tasks import Tasks


@dataclass(frozen=True, eq=False)
class Task:
    """One few-shot task.

    Attributes:
        images: what the indices point into.
        support: int64 [S], images whose class is known.
        support_labels: int64 [S], values 0 to C - 1.
        query: int64 [Q], images to classify.
        class_names: C names.
        query_labels: int64 [Q], the truth; None for a method that is to solve the task.
    """

    images: TaskImages
    support: Tensor
    support_labels: Tensor
    query: Tensor
    class_names: tuple[str, ...]
    query_labels: Tensor | None = None

    @property
    def n_way(self) -> int:
        """C, its classes."""
        return len(self.class_names)

    def blind(self) -> Task:
        """The task without the truth."""
        return replace(self, query_labels=None)

    def features(self, backbone: Backbone, pool: str = "pooled") -> tuple[Tensor, Tensor]:
        """Features of support [S, D] and query [Q, D], float32, computed once for all tasks of these images."""
        both = self.images.features(backbone, torch.cat([self.support, self.query]), pool)
        return both[: len(self.support)], both[len(self.support) :]

    def support_pixels(self) -> Tensor:
        """uint8 [S, 3, H, W], on the CPU."""
        return self.images.pixels(self.support)

    def labels(self, device: torch.device) -> Tensor:
        """`support_labels` on a device."""
        return self.support_labels.to(device)

    @torch.no_grad()
    def run(self, backbone: Backbone, forward: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
        """`forward` over the images at `index` [k], batch after batch, without gradient.

        Args:
            backbone: gives device, precision and normalisation of what `forward` is given, [B, 3, H, W].
            forward: gives [B, D].
            index: images.

        Returns:
            float32 [k, D], on the backbone's device.
        """
        parts = index.split(self.images.batch_size)
        return torch.cat([forward(inputs(backbone, self.images.pixels(part))).float() for part in parts])


def inputs(backbone: Backbone, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Images uint8 [B, 3, H, W] as a backbone reads them, on its device; in its precision when `dtype` is None."""
    return normalize(pixels.to(backbone.device), backbone.mean, backbone.std, dtype or backbone.dtype)


class TextEncoder(Protocol):
    """What classifies images by the names of classes, such as `ClipText`."""

    scale: float
    """Factor on the cosines."""

    def encode(self, class_names: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [C, E]."""

    def project(self, features: Tensor) -> Tensor:
        """Image features [n, D] in the same space, float32 [n, E]; differentiable, for methods that train under it."""


class Needs(NamedTuple):
    """What a method asks for."""

    adapters: int = 0
    """At least so many."""
    heads: bool = False
    """The adapters' classification heads."""
    surrogates: bool = False
    """Labelled images of the adapters' classes."""
    text_encoder: bool = False
    """Text features of the classes' names."""
    fine_tuning: bool = False
    """It trains on each task's support images."""
    rate: bool = False
    """A learning rate, or validation tasks to choose it on."""
    packages: tuple[str, ...] = ()
    """That must be installed."""

    def words(self) -> str:
        """The same for people."""
        found = [f"{self.adapters} adapter{'s' if self.adapters > 1 else ''}"] if self.adapters else []
        found += (
            ["heads"] * self.heads + ["labelled surrogates"] * self.surrogates + ["text encoder"] * self.text_encoder
        )
        return ", ".join([*found, *["fine-tuning"] * self.fine_tuning, *self.packages]) or "nothing"


@dataclass(frozen=True, eq=False)
class Given:
    """What a method is given by `Method.prepare`, once it is checked."""

    backbone: Backbone
    adapters: list[Adapter]
    surrogates: list[Surrogate]
    validation_tasks: list[Task]
    text_encoder: TextEncoder | None


class Method(ABC):
    """A way of answering few-shot tasks. Settings are arguments of the subclass; what it learns is set by `prepare`."""

    needs: ClassVar[Needs] = Needs()

    def check(
        self,
        backbone: Backbone,
        adapters: Sequence[Adapter],
        surrogates: Sequence[Surrogate] | None = None,
        validation_tasks: Sequence[Task] | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        """Make sure that all the method needs is there, without any work; arguments as in `prepare`.

        Raises:
            ValueError: adapters, heads, surrogates, text encoder or validation tasks are missing or do not fit.
            ImportError: a package is missing.
        """
        name, needs = f"method {type(self).__name__}", self.needs
        if len(adapters) < needs.adapters:
            raise ValueError(f"`adapters` must hold at least {needs.adapters} for {name}, got {len(adapters)}.")
        for adapter in adapters if needs.adapters else ():
            backbone.check(adapter)
        headless = [adapter.name for adapter in adapters if adapter.head is None]
        if needs.heads and headless:
            raise ValueError(
                f"`adapters` must have classification heads for {name}, got none in {', '.join(headless[:5])}; load "
                "them with `Adapter.load(path, head=...)`, or choose a method that needs none."
            )
        if needs.surrogates:
            if not surrogates:
                raise ValueError(
                    f"`surrogates` must hold labelled images for {name}, got none; make them with `invert`."
                )
            bare = [each.adapter for each in surrogates if each.labels is None]
            if bare:
                raise ValueError(
                    f"`surrogates` must be labelled for {name}, got {len(bare)} without labels; make them by `invert`."
                )
        if needs.text_encoder and text_encoder is None:
            raise ValueError(f"`text_encoder` must be given for {name}, got none; see `ClipText.load`.")
        if needs.rate and getattr(self, "rate", None) is None and not validation_tasks:
            raise ValueError(
                f"`validation_tasks` must be given for {name}, got none: its learning rate is chosen on them; give "
                "tasks of validation classes, or the rate itself."
            )
        for task in validation_tasks or ():
            if task.query_labels is None:
                raise ValueError("`validation_tasks` must know their `query_labels`, got one without.")
        missing = [package for package in needs.packages if find_spec(package) is None]
        if missing:
            raise ImportError(f"{name} needs {', '.join(missing)}; `pip install {' '.join(missing)}`.")

    def prepare(
        self,
        backbone: Backbone,
        adapters: Sequence[Adapter] = (),
        surrogates: Sequence[Surrogate] | None = None,
        validation_tasks: Sequence[Task] | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> Self:
        """Everything that is done once, whatever the tasks.

        Args:
            backbone: the frozen model; its device and precision are used, and it is left as it is.
            adapters: tuned on other classes.
            surrogates: images of the adapters' classes.
            validation_tasks: tasks of validation classes with `query_labels`, to choose settings on.
            text_encoder: of the classes' names.

        Returns:
            itself.

        Raises:
            ValueError, ImportError: see `check`.
        """
        self.check(backbone, adapters, surrogates, validation_tasks, text_encoder)
        aside = list(validation_tasks or ())
        self._prepare(Given(backbone, list(adapters), list(surrogates or ()), aside, text_encoder))
        return self

    @abstractmethod
    def _prepare(self, given: Given) -> None: ...

    @abstractmethod
    def solve(self, task: Task) -> Tensor:
        """Logits [Q, C] of a task's queries, float32; `prepare` comes first."""

    def solve_all(self, tasks: Sequence[Task]) -> Iterator[Tensor]:
        """`solve` of each task in turn; methods that can solve many at once do."""
        for task in tasks:
            yield self.solve(task)


def make_tasks(images: TaskImages, tasks: Tasks, class_names: Sequence[str]) -> list[Task]:
    """The tasks of a list, with the truth.

    Args:
        images: what the list's indices point into.
        tasks: T tasks.
        class_names: of all classes.
    """
    shots = torch.arange(tasks.n_way).repeat_interleave(tasks.n_shot)
    truth = torch.arange(tasks.n_way).repeat_interleave(tasks.n_query)
    names = [tuple(class_names[c] for c in row) for row in tasks.classes.tolist()]
    return [
        Task(images, support, shots, query, own, truth)
        for support, query, own in zip(tasks.support, tasks.query, names, strict=True)
    ]


def accuracy(method: Any, tasks: Sequence[Task], *arguments: Any) -> Tensor:
    """Accuracy on each task in percent, float32 [T]; `method` gives logits of blind tasks, [Q, C] each."""
    answers = method([task.blind() for task in tasks], *arguments)
    hits = []
    for task, logits in zip(tasks, answers, strict=True):
        assert task.query_labels is not None
        hits.append(100 * (logits.argmax(dim=-1).cpu() == task.query_labels).float().mean())
    return torch.stack(hits)
