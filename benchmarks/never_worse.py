r"""Is the default ever worse than the plain ViT? A grid of adapter pools, on validation classes.

    python benchmarks/never_worse.py --work-dir WORK                                   # all 72 pools: for a GPU
    python benchmarks/never_worse.py --work-dir SHORT --sets cifar_fs --sizes 224 --adapters 4 --tuning-images 30 \
        --epochs 3 --meta-steps 40 --n-query 5                                         # one pool, minutes of a CPU core

ViT-Tiny; pools of rank-4 adapters of 5-way tasks that differ in data set, image size, number, images of a class and
epochs. Differences to the plain ViT are paired over the same 600 tasks of validation classes. What is finished stays
in the work folder: run it again and it goes on, and the table holds all of it. Needs the sets of `sets_224.py` and
vit_tiny_patch16_224.safetensors in the folder that LORARECYCLE_DATA names (../shared/data otherwise). Writes
benchmarks/results/never_worse.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sets_224 import DATA, claim, data_sets, loaded, vit_tiny

from lorarecycle import (
    Adapter,
    Backbone,
    EvaluateConfig,
    LabelledImages,
    RecycleConfig,
    TuneConfig,
    recycle,
    warm_start,
)
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.meta.factors import random_factors
from lorarecycle.meta.warm_start import common_gain
from lorarecycle.reproduce.stages import draw_class_lists, tuned
from lorarecycle.runtime.device import resolve
from lorarecycle.runtime.files import read_json, write_json, write_text
from lorarecycle.vit.features import extract_features

ROOT = Path(__file__).resolve().parent.parent
DISTANCE = EvaluateConfig().distance
N_SHOTS = (1, 5)
ADAPTERS = (4, 8, 20)


class Pool(NamedTuple):
    """What its adapters have in common."""

    data: str
    image_size: int
    adapters: int
    tuning_images: int
    epochs: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


class Grid:
    """All pools, in one work folder.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device, self.dtype = resolve(args.device, args.dtype)
        self.sets = data_sets(DATA)
        self.backbone = cache(self._backbone)
        self.unseen = cache(self._unseen)
        self.plain = cache(self._plain)

    def row(self, pool: Pool) -> dict[str, Any]:
        """Accuracies of the plain ViT and what the others are above it, each with its 95 % interval."""
        path = self.args.work_dir / "rows" / f"{pool}.json"
        if path.exists():
            return read_json(path)
        backbone, adapters = self.backbone(pool.image_size), self.adapters(pool)
        config, like = self.config(), random_factors(backbone, RecycleConfig().meta, 0)
        shared = {"base": backbone, "device": self.device, "dtype": self.dtype}
        makers: dict[str, Callable[[], Adapter]] = {
            "warm start": lambda: warm_start(adapters, base=backbone),
            "default": lambda: recycle(adapters, config=config, **shared),  # type: ignore[arg-type]
        }
        plain = self.plain(pool.data, pool.image_size)
        row: dict[str, Any] = {**pool._asdict(), "gain": common_gain(adapters, like, backbone)}
        row["plain"] = {shots: _figures(found) for shots, found in plain.items()}
        for title, make in makers.items():
            found = self.accuracies(backbone.merge(make()), pool.data, pool.image_size)
            more = {n: replace(e, accuracies=e.accuracies.double() - plain[n].accuracies) for n, e in found.items()}
            row[title] = {shots: _figures(one) for shots, one in more.items()}
            print(pool, title, row[title], flush=True)
        write_json(path, row)
        return row

    def config(self) -> RecycleConfig:
        """The default, shorter where the command line says so."""
        args, default = self.args, RecycleConfig()
        steps, queries = args.meta_steps or default.meta.steps, args.n_query or default.meta.n_query
        return replace(default, meta=replace(default.meta, steps=steps, n_query=queries))

    def adapters(self, pool: Pool) -> list[Adapter]:
        """Tuned where they are not in the work folder; smaller pools are the first of larger ones."""
        make, backbone = self.sets[pool.data].train, self.backbone(pool.image_size)
        assert make is not None
        images, found = make(), []
        lists = draw_class_lists(images.class_names, max(*ADAPTERS, pool.adapters), 5)
        for i, classes in enumerate(lists[: pool.adapters]):
            folder = self.args.work_dir / "adapters" / str(pool._replace(adapters=0)) / f"{i}"
            if not folder.exists():
                own = loaded(images.select_classes(classes), backbone.fit, pool.tuning_images)
                tuned(backbone.clone().to(self.dtype), own, folder, config=TuneConfig(epochs=pool.epochs, seed=i))
            found.append(replace(Adapter.load(folder), name=f"{pool.data}-{i}"))
        return found

    def accuracies(self, model: Backbone, data: str, image_size: int) -> dict[str, Evaluation]:
        """By the number of shots."""
        images = self.unseen(data, image_size)
        features, found = extract_features(model.to(dtype=self.dtype), images.images), {}
        for n_shot in N_SHOTS:
            tasks = sample_tasks(images.labels, n_way=5, n_shot=n_shot, n_query=15, n_tasks=self.args.n_tasks, seed=0)
            found[f"{n_shot}-shot"] = Evaluation(task_accuracies(features, tasks, DISTANCE), tasks)
        return found

    def _backbone(self, image_size: int) -> Backbone:
        return vit_tiny(image_size=image_size, device=self.device)

    def _unseen(self, data: str, image_size: int) -> LabelledImages:
        make = self.sets[data].val
        assert make is not None
        return loaded(make(), self.backbone(image_size).fit, self.args.val_images)

    def _plain(self, data: str, image_size: int) -> dict[str, Evaluation]:
        return self.accuracies(self.backbone(image_size).clone(), data, image_size)


def pool_of(row: dict[str, Any]) -> Pool:
    """The pool of a row."""
    return Pool(*(row[name] for name in Pool._fields))


def _figures(found: Evaluation) -> dict[str, float]:
    return {"mean": found.accuracy, "interval": found.interval}


def table(report: dict[str, Any]) -> str:
    """Markdown; a value below zero by more than its interval is bold."""
    columns = [(title, f"{n}-shot") for n in N_SHOTS for title in ("plain", "warm start", "default")]
    shorter = {name: value for name, value in report["shorter"].items() if value is not None}
    lines = [
        f"`python benchmarks/never_worse.py`: {report['machine']}; {shorter or 'default steps'}. ViT-Tiny, validation "
        f"classes, {report['tasks']} tasks, {DISTANCE}; accuracy of the plain ViT in %, and what the others are "
        "above it, paired, with 95 % intervals.",
        "",
        "| set | px | adapters | images of a class | epochs | gain | "
        + " | ".join(f"{title}, {shots}" for title, shots in columns)
        + " |",
        "| --- " * (6 + len(columns)) + "|",
    ]
    worse = 0
    for row in report["rows"]:
        cells = [str(row[name]) for name in Pool._fields] + [f"{row['gain']:.2f}"]
        for title, shots in columns:
            mean, interval = row[title][shots]["mean"], row[title][shots]["interval"]
            text = f"{mean:.2f}" if title == "plain" else f"{mean:+.2f} ± {interval:.2f}"
            below = title != "plain" and mean < -interval
            worse += below and title == "default"
            cells.append(f"**{text}**" if below else text)
        lines.append(f"| {' | '.join(cells)} |")
    of = len(N_SHOTS) * len(report["rows"])
    lines += ["", f"The default is below the plain ViT by more than the interval in {worse} of {of}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["cifar_fs", "crop_diseases"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[112, 224], help="side in pixels")
    parser.add_argument("--adapters", nargs="+", type=int, default=list(ADAPTERS))
    parser.add_argument("--tuning-images", nargs="+", type=int, default=[30, 150], help="of a class, at most")
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 3, 10], help="of tuning an adapter")
    parser.add_argument("--val-images", type=int, default=40, help="of a class, at most")
    parser.add_argument("--n-tasks", type=int, default=600)
    parser.add_argument("--meta-steps", type=int, help="the default's when left out")
    parser.add_argument("--n-query", type=int, help="of an episode, the default's when left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "never_worse.json")
    args = parser.parse_args()
    grid = Grid(args)
    chosen = itertools.product(args.sets, args.sizes, args.adapters, args.tuning_images, args.epochs)
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {grid.device}, {grid.dtype}, torch {torch.__version__}"
    steps = {"meta_steps": args.meta_steps, "n_query": args.n_query}
    about = {"machine": machine, "tasks": args.n_tasks, "shorter": steps}
    claim(args.work_dir, {**about, "val_images": args.val_images})
    for values in chosen:
        grid.row(Pool(*values))
        rows = sorted((read_json(path) for path in (args.work_dir / "rows").glob("*.json")), key=pool_of)
        report = {**about, "rows": rows}
        write_json(args.output, report)
        write_text(args.output.with_suffix(".md"), table(report))
    print(table(report))


if __name__ == "__main__":
    main()
