r"""Every few-shot method on seven sets, in and across domains: `benchmarks/results/methods.md` from one command.

    python benchmarks/methods.py --work-dir work                              # all methods, sets and shots, 600 tasks
    python benchmarks/methods.py --work-dir work --sets CUB --methods nn warm-start --n-tasks 50     # a part of it

Adapters are tuned on 5-way tasks of train classes: of the set itself in its domain (CIFAR-FS, CUB, VGG-Flower), of
CIFAR-FS for the others. Rates of fine-tuned methods are chosen on validation classes of the set that the adapters are
of. All methods see the same tasks; those that run the model anew for each task see the first 100 of them on two sets
and 30 on the others, and the table says so. Surrogates are inverted from the adapters (`--images inverted`), or are the
adapters' own images (`real`), a bound. What is finished stays in the work folder, cell by cell, and is not done again.
Needs the folder of real data that LORARECYCLE_DATA names (../shared/data otherwise) and pyarrow. Prints the tables, and
writes them and the cells.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from memory import peak_memory, reset_peak_memory

from lorarecycle import (
    Adapter,
    Backbone,
    BatchNormPrior,
    LabelledImages,
    RecycleConfig,
    Surrogate,
    TuneConfig,
    evaluate,
)
from lorarecycle.config import EvaluateConfig, as_plain
from lorarecycle.data.sets import open_dataset
from lorarecycle.fewshot.methods.registry import METHODS, make_method
from lorarecycle.fewshot.tasks import Tasks, sample_tasks
from lorarecycle.reproduce.stages import draw_class_lists, inverted, label_by_teacher, tuned
from lorarecycle.runtime.device import resolve
from lorarecycle.runtime.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
N_WAY = 5
SLOW = ("full", "lora-linear", "average-linear", "lorahub", "lorahub-nn", "mole", "pmf")
"""Methods that run the model again for each task."""


@dataclass(frozen=True)
class Set:
    """A data set, and where its adapters are from."""

    path: str
    parts: tuple[str | None, str | None, str | None]
    """Its train, validation and test part; None where it has none."""
    adapters_of: str
    slow_tasks: int = 30
    """Tasks of the methods in `SLOW`."""
    n_query: int = 15


SETS = {
    "CIFAR-FS": Set("cifar_fs.npz", ("train", "val", "test"), "CIFAR-FS", slow_tasks=100),
    "CUB": Set("datasets/cub", ("train", "validation", "test"), "CUB"),
    "VGG-Flower": Set("datasets/vgg_flower", ("train", "validation", "test"), "VGG-Flower"),
    "EuroSAT": Set("eurosat.npz", (None, None, "test"), "CIFAR-FS", slow_tasks=100),
    "ISIC": Set("datasets/isic", (None, None, "test"), "CIFAR-FS"),
    "CropDiseases": Set("datasets/crop_diseases", (None, None, "test"), "CIFAR-FS"),
    "ChestX": Set("datasets/chestx", (None, None, "test"), "CIFAR-FS", n_query=10),
}


class Bench:
    """What all cells share, made when a cell needs it and kept in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work_dir
        self.data = Path(os.environ.get("LORARECYCLE_DATA", ROOT.parent / "shared" / "data"))
        self.device, self.dtype = resolve(args.device, args.dtype)
        self.adapters, self.surrogates, self.part = cache(self._adapters), cache(self._surrogates), cache(self._part)

    @property
    def plain(self) -> Backbone:
        """ViT-Tiny in float32."""
        weights, size = self.data / "vit_tiny_patch16_224.safetensors", self.args.image_size
        return Backbone.load("vit_tiny_patch16_224", weights=weights, image_size=size, device=self.device)

    def settings(self) -> dict[str, Any]:
        """That every cell of a work folder shares."""
        names = ("image_size", "n_adapters", "epochs", "images", "inversion_steps", "images_per_class", "n_tasks")
        chosen = {name: getattr(self.args, name) for name in (*names, "n_validation_tasks", "quick")}
        where = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        return {**chosen, "machine": f"{where}, {self.device}, {self.dtype}, torch {torch.__version__}"}

    def _part(self, name: str, index: int) -> Any:
        data = open_dataset(self.data / SETS[name].path, SETS[name].parts[index])
        few = torch.bincount(data.labels) < 5 + SETS[name].n_query  # ChestX and the like have small classes
        return data if not few.any() else data.select_classes([i for i, f in enumerate(few.tolist()) if not f])

    def _adapters(self, name: str) -> tuple[list[Adapter], list[LabelledImages]]:
        train = open_dataset(self.data / SETS[name].path, SETS[name].parts[0])
        backbone, adapters, images = self.plain.to(self.dtype), [], []
        for i, names in enumerate(draw_class_lists(train.class_names, self.args.n_adapters, N_WAY)):
            own = train.select_classes(names).load(backbone.fit)
            config = TuneConfig(epochs=self.args.epochs, seed=i)
            adapters.append(tuned(backbone, own, self.work / "adapters" / name / f"task-{i}", config=config))
            images.append(own)
        return adapters, images

    def _surrogates(self, name: str) -> list[Surrogate]:
        adapters, images = self.adapters(name)
        if self.args.images == "real":
            return [label_by_teacher(self.plain, a, x, dtype=self.dtype) for a, x in zip(adapters, images, strict=True)]
        config, found = RecycleConfig.paper().inversion, []
        config = replace(config, steps=self.args.inversion_steps, images_per_class=self.args.images_per_class)
        weights = self.data / "weights" / "tf_efficientnet_lite0.safetensors"
        prior = BatchNormPrior.load("tf_efficientnet_lite0", weights=weights, dtype=self.dtype).to(self.device)
        for adapter in adapters:
            path = self.work / "surrogates" / name / f"{adapter.name}.safetensors"
            found.append(inverted(self.plain, adapter, path, config=config, prior=prior, dtype=self.dtype))
        return found


def cell(bench: Bench, name: str, n_shot: int, method: str) -> dict[str, Any]:
    """Accuracy, seconds and memory of one method on one set."""
    chosen, args, needs = SETS[name], bench.args, METHODS[method].needs
    data, source = bench.part(name, 2), chosen.adapters_of
    config = EvaluateConfig(
        n_shot=n_shot, n_query=chosen.n_query, n_tasks=args.n_tasks, n_validation_tasks=args.n_validation_tasks
    )
    size = {"n_way": N_WAY, "n_shot": n_shot, "n_query": chosen.n_query}
    tasks = sample_tasks(data.labels, **size, n_tasks=args.n_tasks, seed=config.seed, groups=data.groups)
    if method in SLOW:
        n = min(args.n_tasks, chosen.slow_tasks)
        tasks = Tasks(tasks.classes[:n], tasks.support[:n], tasks.query[:n])
    settings: dict[str, Any] = {"steps": 2} if args.quick and (method in SLOW or "recycle" in method) else {}
    if method.startswith("lorahub"):
        settings = {"budget": 3} if args.quick else {}
    if args.quick and method in ("pmf", "caml"):
        settings = {"steps": 2, **({"meta_steps": 2} if method == "pmf" else {})}
    adapters = bench.adapters(source)[0] if needs.adapters else []
    surrogates = bench.surrogates(source) if needs.surrogates else None
    reset()
    result = evaluate(
        bench.plain.to(bench.dtype),
        data,
        method=make_method(method, **settings),
        adapters=adapters,
        surrogates=surrogates,
        validation=bench.part(source, 1) if needs.rate else None,
        config=config,
        tasks=tasks,
        workers=args.workers,
        quiet=True,
    )
    times = {"prepare_seconds": result.prepare_seconds, "seconds_per_task": result.seconds_per_task}
    return {**result.summary(), **times, "peak_memory_GB": peak(), "config": as_plain(config)}


def reset() -> None:
    """Start counting memory: the GPU's where there is one."""
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else reset_peak_memory()


def peak() -> float:
    """Most memory since then, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak_memory()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bench, cells, failed = Bench(args), {}, []
    record = args.work_dir / "settings.json"
    if record.exists() and read_json(record) != bench.settings():
        raise SystemExit(f"`--work-dir` must be of these settings, got {record} of others; choose another folder.")
    write_json(record, bench.settings())
    for name in args.sets:
        for n_shot in args.n_shots:
            for method in args.methods:
                path = args.work_dir / "cells" / name / f"{n_shot}-shot" / f"{method}.json"
                if not path.exists():
                    try:
                        write_json(path, cell(bench, name, n_shot, method))
                    except (ValueError, ImportError, RuntimeError) as error:  # the other cells are worth having
                        failed.append(f"{name}, {n_shot}-shot, {method}: {error}")
                        logging.info("failed: %s\n%s", failed[-1], traceback.format_exc())
                        continue
                cells[name, n_shot, method] = read_json(path)
                logging.info("%s, %d-shot, %s: %.2f", name, n_shot, method, cells[name, n_shot, method]["accuracy"])
                write_text(args.output, page(cells, bench.settings()))
    write_json(
        args.output.with_suffix(".json"),
        {
            "settings": bench.settings(),
            "sets": {name: asdict(SETS[name]) for name in args.sets},
            "cells": {"/".join(map(str, key)): value for key, value in cells.items()},
        },
    )
    print(page(cells, bench.settings()))
    if failed:
        raise SystemExit("\n".join(["without a result:", *failed]))


def page(cells: dict[tuple[str, int, str], dict[str, Any]], settings: dict[str, Any]) -> str:
    """Tables of accuracy with its 95 % interval over tasks, of milliseconds per task and of peak memory."""
    columns = list(dict.fromkeys(key[:2] for key in cells))
    methods = [name for name in METHODS if any(key[2] == name for key in cells)]
    shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("machine", "quick"))
    lines = ["# Methods", "", f"{settings['machine']}; {shown}.", ""]
    lines += ["A rehearsal at small size: these are no results.", ""] if settings["quick"] else []
    tables: dict[str, Callable[[dict[str, Any]], str]] = {
        "Accuracy, % (tasks, where fewer)": lambda c: (
            f"{c['accuracy']:.2f} ± {c['interval']:.2f}" + _fewer(c["n_tasks"], settings["n_tasks"])
        ),
        "Milliseconds per task, the share of features included": lambda c: f"{1000 * c['seconds_per_task']:.3g}",
        "Seconds of preparation": lambda c: f"{c['prepare_seconds']:.3g}",
        "Peak memory, GB": lambda c: f"{c['peak_memory_GB']:.2f}",
    }
    for title, show in tables.items():
        lines += [f"## {title}", "", f"| method | {' | '.join(f'{n}, {s}-shot' for n, s in columns)} |"]
        lines.append("| --- |" + " --- |" * len(columns))
        for method in methods:
            row = [show(cells[(*c, method)]) if (*c, method) in cells else "" for c in columns]
            lines.append(f"| {METHODS[method].title} | {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


def _fewer(n: int, usual: int) -> str:
    return f" ({n})" if n < usual else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name, entry in METHODS.items() if not entry.needs.text_encoder]  # ViT-Tiny has none
    parser.add_argument("--work-dir", type=Path, required=True, help="of one group of settings: keeps all that is done")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=usual, default=usual)
    parser.add_argument("--n-shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--n-tasks", type=int, default=600)
    parser.add_argument("--n-validation-tasks", type=int, default=20)
    parser.add_argument("--n-adapters", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10, help="of tuning an adapter")
    parser.add_argument("--images", choices=("inverted", "real"), default="inverted", help="of the surrogates")
    parser.add_argument("--inversion-steps", type=int, default=2000)
    parser.add_argument("--images-per-class", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2, help="threads that read images")
    parser.add_argument("--quick", action="store_true", help="few steps of what trains: a rehearsal, marked as such")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "methods.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
