"""Stages of an accuracy experiment on anyone's images and adapters; each leaves a file and is not done twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..config import Distance, InversionConfig, MetaConfig, TuneConfig
from ..data.dataset import LabelledImages
from ..fewshot.evaluate import Evaluation, task_accuracies
from ..fewshot.tasks import sample_tasks
from ..inversion.answers import teacher_answers
from ..inversion.invert import invert
from ..inversion.prior import BatchNormPrior
from ..inversion.surrogate import Surrogate
from ..meta.train import meta_train
from ..runtime.files import read_json, write_json
from ..runtime.seeds import stream
from ..tuning import tune
from ..vit.backbone import Backbone
from ..vit.features import extract_features

logger: logging.Logger = logging.getLogger(__name__)

Row = dict[str, dict[str, float]]
"""Column of a table -> "mean" and, where it has one, "interval"."""


def draw_class_lists(classes: Sequence[str], n_tasks: int, n_way: int, *, seed: int = 0) -> list[list[str]]:
    """The classes of each adapter's task, drawn without repetition as long as there are enough.

    Args:
        classes: to draw from, at least `n_way`.
        n_tasks, n_way: how many lists, and of what length.
        seed: of the draw.

    Raises:
        ValueError: fewer classes than `n_way`.
    """
    if len(classes) < n_way:
        raise ValueError(f"`n_way` must be at most the number of classes, {len(classes)}, got {n_way}.")
    names: list[str] = []
    while len(names) < n_tasks * n_way:
        order = torch.randperm(len(classes), generator=stream(seed, "tasks", len(names)))
        names += [classes[i] for i in order[: len(order) // n_way * n_way]]
    return [names[i * n_way : (i + 1) * n_way] for i in range(n_tasks)]


def tuned(
    backbone: Backbone,
    images: LabelledImages,
    folder: Path,
    *,
    config: TuneConfig | Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Adapter:
    """An adapter tuned on the images, from its folder where it is there; arguments as in `tune`."""
    if not folder.exists():
        tune(backbone, images, config=config, name=folder.name, quiet=quiet).save(folder)
    return Adapter.load(folder)


def inverted(
    backbone: Backbone,
    adapter: Adapter,
    path: Path,
    *,
    config: InversionConfig | Mapping[str, Any] | None = None,
    prior: BatchNormPrior | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Surrogate:
    """The surrogate of an adapter, from its file where it is there; arguments as in `invert`."""
    if path.exists():
        return Surrogate.load(path)
    surrogate = invert(backbone, adapter, config=config, prior=prior, seed=seed, dtype=dtype, quiet=quiet)
    surrogate.save(path)
    return surrogate


def label_by_teacher(
    backbone: Backbone, adapter: Adapter, images: LabelledImages, *, dtype: torch.dtype | None = None
) -> Surrogate:
    """Real images in a surrogate's place, with the teacher's logits and scores: a bound for synthesised ones (Tab. 9).

    Args:
        backbone: that the adapter is for.
        adapter: with a head over the images' classes.
        images: resized as `backbone.fit` says.
        dtype: precision of the teacher; the backbone's when None.

    Raises:
        ValueError: no head, or one over other classes.
    """
    head = adapter.head
    if head is None or head.class_names != images.class_names:
        found = "none" if head is None else ", ".join(head.class_names)
        raise ValueError(
            f"adapter {adapter.name!r} must have a head over the images' classes ({', '.join(images.class_names)}), "
            f"got {found}."
        )
    images = images.resize(backbone.fit)
    teacher = backbone.merge(adapter).to(dtype=dtype)
    return Surrogate(
        images.images,
        images.labels,
        class_names=head.class_names,
        patch_size=backbone.patch_size,
        adapter=adapter.name,
        adapter_digest=adapter.weights_digest(),
        **teacher_answers(teacher, images.images, head=head, scores=True)._asdict(),
    )


def trained(
    backbone: Backbone,
    surrogates: Sequence[Surrogate],
    *,
    config: MetaConfig | Mapping[str, Any] | None = None,
    adapters: Sequence[Adapter] = (),
    seed: int = 0,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Adapter:
    """A meta-LoRA, in the precision of the experiment; arguments as in `meta_train`."""
    student = backbone.clone().to(dtype=dtype)
    return meta_train(student, surrogates, config=config, adapters=adapters, seed=seed, quiet=quiet).meta_lora


def measured(
    backbone: Backbone,
    make: Callable[[], Adapter | None],
    datasets: Mapping[str, LabelledImages],
    path: Path,
    *,
    n_way: int = 5,
    n_shots: Sequence[int] = (1, 5),
    n_query: int = 15,
    n_tasks: int = 600,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    distance: Distance = "euclidean",
) -> Row:
    """Accuracy of an adapter on the same tasks for all, in percent, and the seconds that making it took.

    Args:
        backbone: the adapter is merged into it.
        make: gives the adapter; None is the plain backbone.
        datasets: name -> images of classes that no adapter has seen.
        path: JSON file that keeps the row.
        n_way, n_shots, n_query, n_tasks, seed: of the tasks.
        dtype: precision; the backbone's when None.
        distance: see `distance_logits`; the papers' by default.
    """
    if path.exists():
        return read_json(path)
    start = time.perf_counter()
    adapter = make()
    row: Row = {"seconds": {"mean": time.perf_counter() - start}}
    model = (backbone.clone() if adapter is None else backbone.merge(adapter)).to(dtype=dtype)
    for name, images in datasets.items():
        features = extract_features(model, images.images)
        for n_shot in n_shots:
            tasks = sample_tasks(images.labels, n_way=n_way, n_shot=n_shot, n_query=n_query, n_tasks=n_tasks, seed=seed)
            result = Evaluation(task_accuracies(features, tasks, distance), tasks)
            row[f"{name}, {n_shot}-shot"] = {"mean": result.accuracy, "interval": result.interval}
    write_json(path, row)
    logger.info("%s: %s", path.stem, {k: round(v["mean"], 2) for k, v in row.items()})
    return row
