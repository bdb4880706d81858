"""Few-shot accuracy over many tasks, with its confidence interval."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import EvaluateConfig
from ..data.dataset import LabelledImages
from ..data.images import normalize, to_uint8
from ..meta.prototypes import Distance, class_centres, distance_logits
from ..runtime.files import write_atomic
from ..runtime.progress import track
from ..vit.backbone import Backbone
from ..vit.lora import LoRA


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
        if not Path(path).is_file():
            raise FileNotFoundError(f"no task list {path}.")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = [file[name].astype(np.int64) for name in ("classes", "support", "query")]
            return cls(*map(torch.from_numpy, arrays))
        except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} must be a task list written by `Tasks.save`, got {error}.") from error


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Accuracy over tasks, in percent.

    Attributes:
        accuracies: float32 [T], one per task.
        tasks: what it was measured on.
    """

    accuracies: Tensor
    tasks: Tasks

    @property
    def accuracy(self) -> float:
        """Mean over tasks, in percent."""
        return self.accuracies.double().mean().item()

    @property
    def interval(self) -> float:
        """Half width of the 95 % confidence interval, `1.96 s / sqrt(n)`, in percent; NaN for one task."""
        n = len(self.accuracies)
        return 1.96 * self.accuracies.double().std().item() / n**0.5 if n > 1 else float("nan")

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} +- {self.interval:.2f} ({self.tasks})"

    def summary(self) -> dict[str, Any]:
        """The figures as JSON-ready values."""
        tasks = self.tasks
        return {
            "accuracy": self.accuracy,
            "interval": self.interval,
            "n_tasks": len(tasks),
            "n_way": tasks.n_way,
            "n_shot": tasks.n_shot,
            "n_query": tasks.n_query,
        }


def evaluate(
    backbone: Backbone,
    data: LabelledImages,
    meta_lora: Adapter | None = None,
    *,
    config: EvaluateConfig | None = None,
    tasks: Tasks | None = None,
    batch_size: int = 64,
    quiet: bool = False,
) -> Evaluation:
    """Accuracy of nearest class centres on few-shot tasks (Sec. 3, testing setup).

    The features of all images are computed once; tasks are drawn from them. Equal labels, config and seed
    give equal tasks, whatever the backbone and adapter.

    Args:
        backbone: the frozen model.
        data: images of the unseen classes, any size.
        meta_lora: adapter to merge in; the plain backbone when None.
        config: settings; the defaults of `EvaluateConfig` when None.
        tasks: a task list of `data` to use instead of the one that `config` describes.
        batch_size: images per forward pass.
        quiet: no progress bar.

    Raises:
        ValueError: an adapter that does not fit; fewer classes than `n_way` or fewer images of a class than
            `n_shot + n_query`; tasks of other data.
    """
    config = config or EvaluateConfig()
    if tasks is None:
        tasks = sample_tasks(
            data.labels,
            n_way=config.n_way,
            n_shot=config.n_shot,
            n_query=config.n_query,
            n_tasks=config.n_tasks,
            seed=config.seed,
        )
    _check_tasks(tasks, data.labels)
    model = backbone.merge(meta_lora) if meta_lora is not None else backbone
    features = extract_features(model, data.images, batch_size=batch_size, quiet=quiet)
    return Evaluation(task_accuracies(features, tasks, config.distance), tasks)


def sample_tasks(
    labels: Tensor | Sequence[int], *, n_way: int, n_shot: int, n_query: int, n_tasks: int, seed: int
) -> Tasks:
    """Draw few-shot tasks: classes, then `n_shot + n_query` different images of each.

    Args:
        labels: int [n], the class of each image.
        n_way, n_shot, n_query, n_tasks: sizes.
        seed: of the draw.

    Raises:
        ValueError: fewer classes than `n_way`, or a class with fewer images than `n_shot + n_query`.
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
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(classes), generator=generator)[:n_way] for _ in range(n_tasks)])
    drawn = []
    for c in chosen.flatten().tolist():
        drawn.append(members[c][torch.randperm(len(members[c]), generator=generator)[:need]])
    images = torch.stack(drawn).view(n_tasks, n_way, need)
    support, query = images[..., :n_shot].flatten(1), images[..., n_shot:].flatten(1)
    return Tasks(classes[chosen], support, query)


@torch.no_grad()
def extract_features(
    backbone: Backbone, images: Tensor, *, lora: LoRA | None = None, batch_size: int = 64, quiet: bool = True
) -> Tensor:
    """Class-token features of many images.

    Args:
        backbone: the frozen model; its device and dtype are used.
        images: uint8 [n, 3, H, W]; batches are resized to `backbone.image_size` where they differ.
        lora: trainable factors to wear, un-merged.
        batch_size: images per forward pass.
        quiet: no progress bar.

    Returns:
        float32 [n, D] on the CPU.
    """
    features = [torch.empty(0, backbone.embed_dim)]
    batches = images.split(batch_size) if len(images) else ()
    for batch in track(batches, "features", quiet=quiet):
        pixels = to_uint8(batch, backbone.image_size).to(backbone.device)
        out = backbone(normalize(pixels, backbone.mean, backbone.std, backbone.dtype), lora=lora)
        features.append(out.float().cpu())
    return torch.cat(features)


def task_accuracies(features: Tensor, tasks: Tasks, distance: Distance = "euclidean") -> Tensor:
    """Accuracy of nearest class centres on each task, in percent.

    Args:
        features: [n, D], of the images that the tasks index.
        tasks: T tasks.
        distance: see `distance_logits`.

    Returns:
        float32 [T].
    """
    shots = torch.arange(tasks.n_way).repeat_interleave(tasks.n_shot)
    truth = torch.arange(tasks.n_way).repeat_interleave(tasks.n_query)
    accuracies = []
    for support, query in zip(tasks.support.split(100), tasks.query.split(100), strict=True):
        centres = class_centres(features[support], shots.expand(len(support), -1), tasks.n_way)
        predicted = distance_logits(features[query], centres, distance).argmax(dim=-1).cpu()
        accuracies.append(100 * (predicted == truth).float().mean(dim=-1))
    return torch.cat(accuracies)


def _check_tasks(tasks: Tasks, labels: Tensor) -> None:
    labels = labels.cpu()
    for name, index in (("support", tasks.support), ("query", tasks.query)):
        expected = tasks.classes.repeat_interleave(index.shape[1] // tasks.n_way, dim=1)
        if index.min() < 0 or index.max() >= len(labels) or not torch.equal(labels[index], expected):
            raise ValueError(
                f"`tasks` must be a task list of `data`, got {name} images of other classes; draw a new list "
                "with `sample_tasks`."
            )
