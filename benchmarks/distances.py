r"""Which distance to class centres answers best: accuracy and calibration of the plain ViT, on validation classes.

    python benchmarks/distances.py                                              # minutes of a CPU core
    python benchmarks/distances.py --meta-lora FOLDER --sets cifar_fs           # the same of a meta-LoRA

ViT-Tiny, 600 tasks of validation classes; differences to the Euclidean distance are paired. Needs the sets of
`sets_224.py` and vit_tiny_patch16_224.safetensors in the folder that LORARECYCLE_DATA names (../shared/data otherwise).
Writes benchmarks/results/distances.json and .md.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sets_224 import DATA, data_sets, loaded, vit_tiny
from torch import Tensor

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.config import DISTANCES
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.tasks import Tasks, sample_tasks
from lorarecycle.meta.prototypes import Distance, class_centres, distance_logits
from lorarecycle.runtime.files import write_json, write_text
from lorarecycle.vit.features import extract_features

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {"cifar_fs": 40, "vgg_flower": 20, "cub": 10, "crop_diseases": 60}
"""Of each validation class, at most."""
TASKS = ((2, 1), (2, 5), (5, 1), (5, 5), (10, 1), (10, 5))
"""Ways and shots."""


def doubts(features: Tensor, tasks: Tasks, distance: Distance) -> tuple[float, float]:
    """Mean cross-entropy of the true classes in nats, and mean probability of the answers in percent."""
    shots = torch.arange(tasks.n_way).repeat_interleave(tasks.n_shot)
    truth = torch.arange(tasks.n_way).repeat_interleave(tasks.n_query)
    entropies, sure = [], []
    for support, query in zip(tasks.support, tasks.query, strict=True):
        centres = class_centres(features[support], shots, tasks.n_way)
        logits = distance_logits(features[query], centres, distance)
        entropies.append(F.cross_entropy(logits, truth))
        sure.append(logits.softmax(-1).amax(-1).mean())
    return torch.stack(entropies).mean().item(), 100 * torch.stack(sure).mean().item()


def rows(features: Tensor, labels: Tensor, n_tasks: int) -> Iterator[dict[str, Any]]:
    """Every distance on every kind of tasks."""
    n_query = min(15, int(torch.bincount(labels).min()) - 5)
    for n_way, n_shot in TASKS:
        if n_way > int(labels.max()) + 1:
            continue
        tasks = sample_tasks(labels, n_way=n_way, n_shot=n_shot, n_query=n_query, n_tasks=n_tasks, seed=0)
        compared = [d for d in DISTANCES if d != "sqeuclidean"]  # which answers as "euclidean" does
        found = {d: task_accuracies(features, tasks, d).double() for d in compared}
        for distance, accuracies in found.items():
            more = Evaluation(accuracies - found["euclidean"], tasks)
            entropy, sure = doubts(features, tasks, distance)
            yield {
                **{"n_way": n_way, "n_shot": n_shot, "distance": distance, "accuracy": accuracies.mean().item()},
                **{"more": more.accuracy, "interval": more.interval, "entropy": entropy, "sure": sure},
            }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"`{report['command']}`: {report['machine']}. ViT-Tiny, validation classes; accuracy in %, what it is above "
        "the Euclidean distance's, paired, with 95 % intervals; cross-entropy of the true class; mean probability of "
        "the answers in %, which should be the accuracy.",
        "",
        "| set | px | task | distance | accuracy | above Euclidean | cross-entropy | probability |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        task = f"{row['n_way']}-way {row['n_shot']}-shot"
        more = "" if row["distance"] == "euclidean" else f"{row['more']:+.2f} ± {row['interval']:.2f}"
        lines.append(
            f"| {row['set']} | {row['image_size']} | {task} | {row['distance']} | {row['accuracy']:.2f} | {more} | "
            f"{row['entropy']:.3f} | {row['sure']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--image-size", type=int, help="side in pixels; the ViT's own when left out")
    parser.add_argument("--meta-lora", type=Path, help="folder of an adapter that the ViT wears")
    parser.add_argument("--n-tasks", type=int, default=600)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "distances.json")
    args = parser.parse_args()
    backbone = vit_tiny(image_size=args.image_size)
    if args.meta_lora is not None:
        backbone = backbone.merge(Adapter.load(args.meta_lora))
    report: dict[str, Any] = {
        "command": "python benchmarks/distances.py " + shlex.join(sys.argv[1:]),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "rows": [],
    }
    for name in args.sets:
        make = data_sets(DATA)[name].val
        assert make is not None
        images = loaded(make(), backbone.fit, IMAGES[name])
        features = extract_features(backbone, images.images).float().cpu()
        where = {"set": name, "image_size": backbone.image_size}
        report["rows"] += [where | row for row in rows(features, images.labels, args.n_tasks)]
        write_json(args.output, report)
        write_text(args.output.with_suffix(".md"), table(report))
    print(table(report))


if __name__ == "__main__":
    main()
