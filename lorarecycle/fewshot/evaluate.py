"""Few-shot accuracy over many tasks, with its confidence interval."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.load_many import AdapterLike, load_adapters
from ..config import EvaluateConfig, as_config
from ..data.dataset import LabelledImages
from ..data.lazy import Dataset, require_labelled
from ..data.names import is_number
from ..inversion.surrogate import Surrogate
from ..meta.prototypes import Distance, class_centres, distance_logits
from ..runtime.distributed import ALONE, Group
from ..runtime.progress import track
from ..runtime.seeds import derive
from ..vit.backbone import Backbone
from ..vit.base import warn_of_doubts
from .images import TaskImages
from .methods.base import Method, Task, TextEncoder, accuracy, make_tasks
from .methods.registry import make_method
from .tasks import Tasks, check_tasks, sample_tasks

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Accuracy over tasks, in percent.

    Attributes:
        accuracies: float32 [T], one per task.
        tasks: what it was measured on.
        prepare_seconds: that preparing the method took; NaN where nobody looked.
        seconds_per_task: that a task took on average, its share of the features included.
    """

    accuracies: Tensor
    tasks: Tasks
    prepare_seconds: float = float("nan")
    seconds_per_task: float = float("nan")

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
    data: LabelledImages | Dataset,
    meta_lora: AdapterLike | None = None,
    *,
    method: str | Method = "nn",
    adapters: AdapterLike | Sequence[AdapterLike] = (),
    surrogates: Sequence[Surrogate] | None = None,
    validation: LabelledImages | Dataset | None = None,
    text_encoder: TextEncoder | None = None,
    config: EvaluateConfig | Mapping[str, Any] | None = None,
    seed: int | None = None,
    tasks: Tasks | None = None,
    images: TaskImages | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = False,
    group: Group = ALONE,
) -> Evaluation:
    """Accuracy of a method on few-shot tasks (Sec. 3, testing setup); of nearest class means unless told otherwise.

    Features that do not depend on the task are computed once for all tasks. Equal labels, config and seed give equal
    tasks, whatever the method, the backbone and the adapters. Everything is checked before anything runs.

    Args:
        backbone: the frozen model.
        data: images of the unseen classes, any size, in memory or on disk.
        meta_lora: adapter to merge in, or what `Adapter.load` reads; the plain backbone when None. For methods that
            take no adapters themselves.
        method: a name in `lorarecycle.fewshot.methods.registry.METHODS`, or a `Method` with settings of your own, which
            keeps its own distance. A named one takes that of `config` where it has any to choose (LoRAHub and
            methods with a classifier have none).
        adapters: tuned on other classes, for methods that use them; or what `load_adapters` reads.
        surrogates: images of the adapters' classes, for methods that train on them.
        validation: images of validation classes, for methods that choose a setting, on `config.n_validation_tasks`
            tasks.
        text_encoder: for methods that read the classes' names.
        config: settings, or a mapping of those that differ from the defaults of `EvaluateConfig`.
        seed: of the task list and of a method that is given by name, in place of `config.seed`.
        tasks: a task list of `data` to use instead of the one that `config` describes.
        images: those of `data`, from an earlier call whose features are worth keeping; `batch_size` and `workers` are
            theirs.
        batch_size: images per forward pass.
        workers: threads that read image files; one when None.
        quiet: no progress bar.
        group: processes that call this together, such as `runtime.distributed.join(device)` under torchrun: each solves
            its part of the tasks, and all get the accuracies of all. Each computes the features of its own tasks'
            images, so this pays for methods that fine-tune.

    Raises:
        TypeError: `data` that is neither `LabelledImages` nor a `Dataset`.
        ValueError: an adapter that does not fit; fewer classes than `n_way` or fewer images of a class than
            `n_shot + n_query`; tasks of other data; an unknown method, or one that lacks what it needs.
        ImportError: a package that the method needs is missing.
    """
    config = as_config(EvaluateConfig, config)
    seed = config.seed if seed is None else seed
    require_labelled(data, "data")
    if isinstance(method, str):
        method = make_method(method, like={"distance": config.distance, "seed": seed})
    if meta_lora is not None and not isinstance(meta_lora, Adapter):
        meta_lora = Adapter.load(meta_lora)
    if not (isinstance(adapters, (list, tuple)) and all(isinstance(one, Adapter) for one in adapters)):
        adapters = load_adapters(adapters)
    tasks = draw_tasks(data, config, seed) if tasks is None else tasks
    check_tasks(tasks, data.labels)
    quiet = quiet or not group.leads
    reading = {"batch_size": batch_size, "workers": workers, "quiet": quiet}
    aside: list[Task] | None = None
    if validation is not None:
        like = replace(config, n_way=tasks.n_way, n_shot=tasks.n_shot, n_query=tasks.n_query)
        like = replace(like, n_tasks=config.n_validation_tasks)
        drawn = draw_tasks(validation, like, derive(seed, "validation"))
        aside = make_tasks(_task_images(validation, backbone, drawn, **reading), drawn, validation.class_names)
    if meta_lora is not None:
        if method.needs.adapters:
            raise ValueError(
                f"`meta_lora` must be left out for method {type(method).__name__}, which takes the adapters themselves."
            )
        backbone.check(meta_lora)
    method.check(backbone, adapters, surrogates, aside, text_encoder)
    _warn_of_seen(adapters if method.needs.adapters else (), data.class_names)
    if meta_lora is not None:
        warn_of_doubts(backbone, [meta_lora])
        backbone = backbone.merge(meta_lora)
    clock = time.perf_counter()
    method.prepare(backbone, adapters, surrogates, aside, text_encoder)
    prepared = time.perf_counter()
    group = group if len(tasks) >= group.size else ALONE
    first, last = group.own(len(tasks))
    part = Tasks(tasks.classes[first:last], tasks.support[first:last], tasks.query[first:last])
    seen = _task_images(data, backbone, part, **reading) if images is None else images
    found = make_tasks(seen, part, data.class_names)
    with track(range(len(found)), "tasks", unit="tasks", quiet=quiet or not method.needs.fine_tuning) as bar:

        def answers(blind: list[Task]) -> Iterator[Tensor]:
            for logits in method.solve_all(blind):
                bar.update()
                yield logits

        accuracies = torch.zeros(len(tasks), device=backbone.device)
        accuracies[first:last] = accuracy(answers, found).to(accuracies)
    solved = time.perf_counter()
    group.add(accuracies)
    return Evaluation(accuracies.cpu(), tasks, prepared - clock, (solved - prepared) / len(found))


def draw_tasks(data: LabelledImages | Dataset, config: EvaluateConfig, seed: int) -> Tasks:
    """The `config.n_tasks` tasks of the data under a seed; errors as in `sample_tasks`."""
    return sample_tasks(
        data.labels,
        n_way=config.n_way,
        n_shot=config.n_shot,
        n_query=config.n_query,
        n_tasks=config.n_tasks,
        seed=seed,
        groups=data.groups,
    )


def _task_images(data: LabelledImages | Dataset, backbone: Backbone, tasks: Tasks, **settings: Any) -> TaskImages:
    wanted = torch.cat([tasks.support.flatten(), tasks.query.flatten()])
    return TaskImages(data.images, backbone.fit, wanted=wanted, **settings)


def seen_names(adapters: Sequence[Adapter], class_names: Sequence[str]) -> list[str]:
    """The classes that adapters' heads name too, unless the names are mere numbers."""
    known = {name for adapter in adapters if adapter.head is not None for name in adapter.head.class_names}
    return sorted(name for name in known & set(class_names) if not is_number(name))


def _warn_of_seen(adapters: Sequence[Adapter], class_names: Sequence[str]) -> None:
    """A line in the log where adapters' heads name classes of the tasks, unless the names are mere numbers."""
    seen = seen_names(adapters, class_names)
    if seen:
        logger.warning(
            "%d of %d classes have the name of one that an adapter was tuned on (%s): the tasks are not of unseen "
            "classes, unless these are others of the same name",
            len(seen),
            len(class_names),
            ", ".join(seen[:5]),
        )


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
