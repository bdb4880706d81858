"""Few-shot accuracy over many tasks, with its confidence interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import EvaluateConfig, as_config
from ..data.dataset import LabelledImages
from ..meta.prototypes import Distance, class_centres, distance_logits
from ..vit.backbone import Backbone
from ..vit.base import warn_of_doubts
from ..vit.features import extract_features
from .tasks import Tasks, check_tasks, sample_tasks


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
    config: EvaluateConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
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
        config: settings, or a mapping of those that differ from the defaults of `EvaluateConfig`.
        seed: of the task list, in place of `config.seed`.
        tasks: a task list of `data` to use instead of the one that `config` describes.
        batch_size: images per forward pass.
        quiet: no progress bar.

    Raises:
        ValueError: an adapter that does not fit; fewer classes than `n_way` or fewer images of a class than
            `n_shot + n_query`; tasks of other data.
    """
    config = as_config(EvaluateConfig, config)
    if tasks is None:
        tasks = sample_tasks(
            data.labels,
            n_way=config.n_way,
            n_shot=config.n_shot,
            n_query=config.n_query,
            n_tasks=config.n_tasks,
            seed=config.seed if seed is None else seed,
        )
    check_tasks(tasks, data.labels)
    if meta_lora is not None:
        warn_of_doubts(backbone, [meta_lora])
    model = backbone.merge(meta_lora) if meta_lora is not None else backbone
    features = extract_features(model, data.images, batch_size=batch_size, quiet=quiet)
    return Evaluation(task_accuracies(features, tasks, config.distance), tasks)


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
