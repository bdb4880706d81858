"""Lists of few-shot tasks: drawn from a seed, checked against data, kept in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import write_atomic
from ..runtime.npz import read_npz_arrays

TRIES = 200
"""Draws of a class's support before it is said that its groups leave too few queries."""


@dataclass(frozen=True, eq=False)
class Tasks:
    """A list of few-shot tasks over one set of images.

    Attributes:
        classes: int64 [T, n_way], the classes of each task.
        support: int64 [T, n_way * n_shot], image indices, class after class in the order of `classes`.
        query: int64 [T, n_way * n_query], likewise.
    """

    classes: Tensor
    support: Tensor
    query: Tensor

    def __post_init__(self) -> None:
        shapes = [list(x.shape) for x in (self.classes, self.support, self.query)]
        flat = all(len(s) == 2 and min(s) > 0 and s[0] == shapes[0][0] for s in shapes)
        if not flat or any(s[1] % shapes[0][1] for s in shapes):
            raise ValueError(
                "`classes`, `support` and `query` must be [T, n_way], [T, n_way * n_shot] and "
                f"[T, n_way * n_query], got {shapes}."
            )

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def n_way(self) -> int:
        """Classes of a task."""
        return self.classes.shape[1]

    @property
    def n_shot(self) -> int:
        """Support images per class."""
        return self.support.shape[1] // self.n_way

    @property
    def n_query(self) -> int:
        """Query images per class."""
        return self.query.shape[1] // self.n_way

    def __str__(self) -> str:
        return f"{len(self)} {self.n_way}-way {self.n_shot}-shot tasks"

    def first(self, count: int) -> Tasks:
        """The first tasks of the list; all where it has no more."""
        return Tasks(self.classes[:count], self.support[:count], self.query[:count])

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a npz file with arrays `classes`, `support` and `query`, atomically."""
        arrays = {name: getattr(self, name).numpy() for name in ("classes", "support", "query")}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)

        return write_atomic(path, write)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Tasks:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file.
        """
        path = Path(path).expanduser()
        names = ("classes", "support", "query")
        found = read_npz_arrays(path, names)
        try:
            if set(found) != {*names}:
                raise ValueError(f"no {', '.join(sorted({*names} - set(found)))}")
            for name, array in found.items():
                if array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() < 2**62):
                    raise ValueError(f"{name} of {array.dtype}, or below 0")
            return cls(*(torch.from_numpy(found[name].astype(np.int64)) for name in names))
        except ValueError as error:
            raise ValueError(f"{path} must be a task list written by `Tasks.save`, got {error}.") from error


def sample_tasks(
    labels: Tensor | Sequence[int],
    *,
    n_way: int,
    n_shot: int,
    n_query: int,
    n_tasks: int,
    seed: int,
    groups: Tensor | Sequence[int] | None = None,
) -> Tasks:
    """Draw few-shot tasks: classes, then `n_shot + n_query` different images of each.

    Args:
        labels: int [n], the class of each image.
        n_way, n_shot, n_query, n_tasks: sizes.
        seed: of the draw.
        groups: int [n], images that belong together, such as those of one patient: no query of a task is of a group
            that a support image is of. None: every image stands alone.

    Raises:
        ValueError: fewer classes than `n_way`, a class with fewer images than `n_shot + n_query`, or with too few
            groups.
    """
    for name, value in (("n_way", n_way), ("n_shot", n_shot), ("n_query", n_query), ("n_tasks", n_tasks)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    labels = torch.as_tensor(labels).cpu()
    classes = labels.unique()
    if len(classes) < n_way:
        raise ValueError(f"`n_way` must be at most the number of classes, {len(classes)}, got {n_way}.")
    members = [(labels == c).nonzero()[:, 0] for c in classes]
    need = n_shot + n_query
    for c, found in zip(classes.tolist(), members, strict=True):
        if len(found) < need:
            raise ValueError(
                f"`n_shot + n_query` must be at most the images of every class, got {need}; class {c} has "
                f"{len(found)}. Lower them or leave the class out."
            )
    if groups is not None:
        groups = torch.as_tensor(groups).cpu()
        if groups.shape != labels.shape:
            raise ValueError(
                f"`groups` must have one value per image, got {list(groups.shape)} for {len(labels)} images."
            )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(classes), generator=generator)[:n_way] for _ in range(n_tasks)])
    if groups is None:
        drawn = [_draw(members[c], need, generator) for c in chosen.flatten().tolist()]
    else:
        drawn = [
            torch.cat(_draw_apart(members[c], groups, n_shot, n_query, int(classes[c]), generator))
            for c in chosen.flatten().tolist()
        ]
    images = torch.stack(drawn).view(n_tasks, n_way, need)
    support, query = images[..., :n_shot].flatten(1), images[..., n_shot:].flatten(1)
    return Tasks(classes[chosen], support, query)


def _draw(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return members[torch.randperm(len(members), generator=generator)[:count]]


def _draw_apart(
    members: Tensor, groups: Tensor, n_shot: int, n_query: int, label: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Support [n_shot] and query [n_query] of one class, of different groups."""
    most = 0
    for _ in range(TRIES):
        order = _draw(members, len(members), generator)
        support = order[:n_shot]
        rest = order[~torch.isin(groups[order], groups[support])]
        if len(rest) >= n_query:
            return support, rest[:n_query]
        most = max(most, len(rest))
    raise ValueError(
        f"`n_query` must be at most the images that are of other groups than the support's, got {n_query}; class "
        f"{label} has {len(members)} images of {len(groups[members].unique())} groups, of which {most} were left at "
        "most. Lower `n_shot` and `n_query`, or leave the class out."
    )


def check_tasks(tasks: Tasks, labels: Tensor) -> None:
    """Make sure that tasks are of images with these labels.

    Raises:
        ValueError: indices out of range, or images of other classes.
    """
    labels = labels.cpu()
    for name, index in (("support", tasks.support), ("query", tasks.query)):
        expected = tasks.classes.repeat_interleave(index.shape[1] // tasks.n_way, dim=1)
        if index.min() < 0 or index.max() >= len(labels) or not torch.equal(labels[index], expected):
            raise ValueError(
                f"`tasks` must be a task list of `data`, got {name} images of other classes; draw a new list "
                "with `sample_tasks`."
            )
