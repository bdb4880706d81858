"""Few-shot accuracy of an exported encoder beside PyTorch's in float32, on the same tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.dataset import LabelledImages
from ..data.images import normalize, to_uint8
from ..fewshot.evaluate import task_accuracies
from ..fewshot.tasks import Tasks, sample_tasks
from .check import check_device, full_float32
from .config import ExportConfig
from .graphs import EncoderGraph
from .real_images import handwritten_digits
from .runtime import Graph

N_TASKS = 600


class Trial(NamedTuple):
    """Images and the tasks that an exported encoder is tried on."""

    images: Tensor
    tasks: Tasks
    words: str


def make_trial(data: LabelledImages | None = None, *, n_shot: int = 1, n_query: int = 15, seed: int = 0) -> Trial:
    """600 tasks, at most 5-way.

    Args:
        data: labelled images; 80 handwritten digits when None (then `n_query` is at most 7).
        n_shot, n_query, seed: of the tasks.

    Raises:
        ValueError: too few images in a class.
    """
    groups = None
    if data is None:
        pictures, digits = handwritten_digits()
        keep = torch.arange(len(digits)) % 20 < 8
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)[keep]
        labels, what, n_query = torch.from_numpy(digits)[keep], "handwritten digits", min(n_query, 8 - n_shot)
    else:
        images, labels, what, groups = data.images, data.labels, "the given images", data.groups
    n_way = min(5, int(labels.unique().numel()))
    shape = {"n_way": n_way, "n_shot": n_shot, "n_query": n_query, "n_tasks": N_TASKS, "seed": seed}
    tasks = sample_tasks(labels, groups=groups, **shape)
    return Trial(images, tasks, f"{N_TASKS} {n_way}-way {n_shot}-shot tasks of {what}")


def compare_accuracy(
    graph: EncoderGraph, path: Path, config: ExportConfig, trial: Trial, device: str = "cpu"
) -> dict[str, Any]:
    """Accuracy in percent over the tasks of a trial.

    Args:
        graph: the float32 encoder.
        path: the exported one.
        config: how it was exported.
        trial: see `make_trial`.
        device: where both run.

    Returns:
        {"tasks": words, "float32": percent, the dtype: percent}.
    """
    ours, plain = [], []
    exported = Graph(path, providers=check_device(device))
    graph = graph.to(device)
    size = config.batch_size or 16
    for part in trial.images.split(size):
        pixels = _prepare(part, graph)
        padded = torch.cat([pixels, pixels[-1:].expand(size - len(pixels), -1, -1, -1)])
        rows = exported.run({"pixel_values": padded.numpy()})["embeddings"].numpy()[: len(pixels)]
        ours.append(torch.from_numpy(rows))
        with torch.no_grad(), full_float32(device):
            plain.append(graph(pixels.to(device)).cpu())
    graph.to("cpu")
    accuracy = {
        name: task_accuracies(torch.cat(rows), trial.tasks, config.distance).double().mean().item()
        for name, rows in (("float32", plain), (config.dtype, ours))
    }
    return {"tasks": trial.words, **accuracy}


def _prepare(images: Tensor, graph: EncoderGraph) -> Tensor:
    pixels = to_uint8(images, graph.backbone.fit)
    return pixels if graph.uint8_input else normalize(pixels, graph.backbone.mean, graph.backbone.std)
