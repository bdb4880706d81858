"""What a report measures on images of unseen classes: accuracy beside the baselines, and who is taken for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import EvaluateConfig, as_config
from ..data.dataset import LabelledImages
from ..fewshot.evaluate import Evaluation, draw_tasks, task_accuracies
from ..fewshot.methods.average import average
from ..fewshot.tasks import Tasks
from ..meta.prototypes import Distance, class_centres, distance_logits
from ..meta.warm_start import warm_start
from ..runtime.files import write_json
from ..vit.backbone import Backbone
from ..vit.features import extract_features
from .run import ACCURACY, Run

PLAIN, AVERAGE, WARM_START, META_LORA = "plain ViT", "average of the adapters", "warm start alone", "meta-LoRA"


def measure_run(
    run: Run,
    backbone: Backbone,
    data: LabelledImages,
    *,
    adapters: Sequence[Adapter] = (),
    n_shots: Sequence[int] = (1, 5),
    config: EvaluateConfig | Mapping[str, Any] | None = None,
    name: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the meta-LoRA of a run and what it is compared with, on the same tasks; kept in the run's folder.

    Args:
        run: finished.
        backbone: that the run was of.
        data: images of classes that no adapter has seen.
        adapters: those that went in, for the baselines made of them; left out where none are given.
        n_shots: support images per class, a column each; those that the data has too few images for are left out.
        config: tasks; `n_shot` plays no part.
        name: of the data.
        quiet: no progress bars.

    Returns:
        `{"data", "classes", "tasks", "rows": {method: {shots: {"accuracy", "interval"}}}, "confusion"}`, as it is
        written to accuracy.json: percent, and shares [C, C] of queries of a class (rows) by answer (columns), at the
        fewest shots.

    Raises:
        ValueError: fewer classes than `n_way`, or too few images for any of `n_shots`; an adapter that does not fit.
    """
    config = as_config(EvaluateConfig, config)
    tasks, errors = {}, []
    for shot in sorted(n_shots):
        try:
            tasks[shot] = draw_tasks(data, replace(config, n_shot=shot), config.seed)
        except ValueError as error:
            errors.append(error)
    if not tasks:
        raise errors[0]
    methods: dict[str, Adapter | None] = {PLAIN: None}
    if adapters:
        meta = run.config.meta
        methods[AVERAGE] = average(adapters)
        if meta.init == "adapters":
            like: dict[str, Any] = {
                "r": meta.r,
                "sites": meta.sites,
                "layers": meta.layers,
                "gain": meta.warm_start_gain,
            }
            methods[WARM_START] = warm_start(adapters, base=backbone, **like)
    methods[META_LORA] = run.meta_lora
    rows: dict[str, dict[str, dict[str, float]]] = {}
    features = torch.empty(0)
    for method, adapter in methods.items():
        model = backbone if adapter is None else backbone.merge(adapter)
        features = extract_features(model, data.images, quiet=quiet)
        found = {shot: Evaluation(task_accuracies(features, t, config.distance), t) for shot, t in tasks.items()}
        rows[method] = {str(shot): {"accuracy": one.accuracy, "interval": one.interval} for shot, one in found.items()}
    fewest = tasks[min(tasks)]
    measured = {
        "data": name,
        "images": len(data),
        "classes": list(data.class_names),
        "tasks": {name: getattr(config, name) for name in ("n_way", "n_query", "n_tasks", "seed", "distance")},
        "rows": rows,
        "confusion": confusion(features, data.labels, fewest, config.distance).tolist(),
    }
    write_json(run.work.folder / ACCURACY, measured)
    return measured


def confusion(features: Tensor, labels: Tensor, tasks: Tasks, distance: Distance = "euclidean") -> Tensor:
    """Shares of the queries of each class (rows) that are taken for each class (columns), over all tasks.

    Args:
        features: [n, D], of the images that the tasks index.
        labels: int64 [n].
        tasks: T tasks over C classes.
        distance: see `distance_logits`.

    Returns:
        float64 [C, C]; rows sum to 1, or are 0 for classes that no task asked for. A class that is in many tasks
        beside another can be taken for it more often: shares depend on what the tasks offer.
    """
    C = int(labels.max()) + 1
    shots = torch.arange(tasks.n_way).repeat_interleave(tasks.n_shot)
    counts = torch.zeros(C, C, dtype=torch.float64)
    for classes, support, query in zip(tasks.classes, tasks.support, tasks.query, strict=True):
        centres = class_centres(features[support][None], shots[None], tasks.n_way)
        answers = distance_logits(features[query][None], centres, distance)[0].argmax(-1)
        pairs = labels[query] * C + classes[answers]
        counts += torch.bincount(pairs, minlength=C * C).view(C, C)
    return counts / counts.sum(1, keepdim=True).clamp_min(1)
