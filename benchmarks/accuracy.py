"""Few-shot accuracy on CIFAR-FS: plain ViT, averaged adapters, meta-LoRA from surrogates, and from real images.

    python benchmarks/accuracy.py

Adapters are tuned on 5-way tasks of the train classes and every method is evaluated on the same tasks of the test
classes. The last row trains the same meta-LoRA on the adapters' own training images: the bound of what surrogates
can give. Needs cifar_fs.npz, vit_tiny_patch16_224.safetensors and resnet20_cifar10.safetensors in the folder that
LORARECYCLE_DATA names (../shared/data otherwise). Prints a table and writes JSON with times and memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from resnet20 import resnet20_prior

from lorarecycle import (
    Adapter,
    Backbone,
    EvaluateConfig,
    InversionConfig,
    LabelledImages,
    MetaConfig,
    RecycleConfig,
    Surrogate,
    TuneConfig,
    evaluate,
    load_dataset,
    meta_train,
    recycle,
    tune,
)
from lorarecycle.baselines.average import average
from lorarecycle.config import as_plain
from lorarecycle.evaluation import sample_tasks
from lorarecycle.files import write_json
from lorarecycle.hardware import resolve
from lorarecycle.images import normalize
from lorarecycle.seeds import stream

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = Path(os.environ.get("LORARECYCLE_DATA", ROOT.parent / "shared" / "data"))
    device, dtype = resolve(args.device, args.dtype)
    backbone = Backbone.load(
        "vit_tiny_patch16_224", weights=data / "vit_tiny_patch16_224.safetensors", image_size=args.image_size
    ).to(device)
    train = load_dataset(data / "cifar_fs.npz", "train")
    unseen = load_dataset(data / "cifar_fs.npz", args.split)
    config = RecycleConfig(
        InversionConfig(
            images_per_class=args.images_per_class,
            steps=args.inversion_steps,
            batch_size=args.batch_size,
            prior=None,
        ),
        MetaConfig(steps=args.meta_steps, n_way=args.n_way),
        seed=args.seed,
    )
    stages: dict[str, dict[str, float]] = {}
    tasks_of = class_lists(train, args.adapters, args.n_way, args.seed)
    adapters, images = measured(stages, "tune adapters", lambda: tune_all(backbone, train, tasks_of, args))
    real = [label_by_teacher(backbone, a, i) for a, i in zip(adapters, images, strict=True)]
    bound = measured(
        stages,
        "meta-training on real images",
        lambda: meta_train(backbone.clone().to(dtype), real, config.meta, seed=args.seed).meta_lora,
    )
    prior = resnet20_prior(data / "resnet20_cifar10.safetensors")
    work_dir = args.work_dir and args.work_dir / "recycle"
    meta_lora = measured(
        stages,
        "recycle (inversion and meta-training)",
        lambda: recycle(
            adapters, base=backbone, config=config, prior=prior, device=device, dtype=dtype, work_dir=work_dir
        ),
    )
    methods: dict[str, Adapter | None] = {
        "plain ViT, nearest class mean": None,
        "average of the adapters": average(adapters),
        "meta-LoRA from surrogates": meta_lora,
        "meta-LoRA from real images (bound)": bound,
    }
    rows = measured(stages, "evaluation", lambda: compare(backbone, unseen, methods, args))
    report = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {device}, {dtype}, torch {torch.__version__}",
        "split": args.split,
        "config": as_plain(config),
        "accuracy": rows,
        "stages": stages,
    }
    write_json(args.output, report)
    print_table(report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--n-way", type=int, default=5)
    parser.add_argument("--n-shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--n-tasks", type=int, default=600)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--inversion-steps", type=int, default=60)
    parser.add_argument("--images-per-class", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=20, help="of the inversion")
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="choose settings on val only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work-dir", type=Path, help="keep adapters, surrogates and checkpoints here")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy_cifar_fs.json")
    return parser.parse_args()


def class_lists(train: LabelledImages, n_adapters: int, n_way: int, seed: int) -> list[list[str]]:
    """The classes of each adapter's task, drawn without repetition as long as there are enough."""
    names: list[str] = []
    while len(names) < n_adapters * n_way:
        order = torch.randperm(len(train.class_names), generator=stream(seed, "tasks", len(names)))
        names += [train.class_names[i] for i in order[: len(order) // n_way * n_way]]
    return [names[i * n_way : (i + 1) * n_way] for i in range(n_adapters)]


def tune_all(
    backbone: Backbone, train: LabelledImages, tasks: list[list[str]], args: argparse.Namespace
) -> tuple[list[Adapter], list[LabelledImages]]:
    """One adapter for each list of classes, and the images that it was tuned on."""
    adapters, images = [], []
    for i, names in enumerate(tasks):
        task = train.select_classes(names).resize(args.image_size)
        images.append(task)
        folder = args.work_dir and args.work_dir / "adapters" / f"task-{i}"
        if folder and folder.exists():
            adapters.append(Adapter.load(folder))
            continue
        config = TuneConfig(epochs=args.tune_epochs, seed=args.seed + i)
        adapters.append(tune(backbone, task, config, name=f"task-{i}"))
        if folder:
            adapters[-1].save(folder)
    return adapters, images


@torch.no_grad()
def label_by_teacher(backbone: Backbone, adapter: Adapter, task: LabelledImages) -> Surrogate:
    """Real images in a surrogate's place, with the teacher's logits."""
    assert adapter.head is not None
    teacher, head = backbone.merge(adapter), adapter.head
    batches = task.images.split(100)
    logits = [head(teacher(normalize(b.to(teacher.device), teacher.mean, teacher.std))).cpu() for b in batches]
    return Surrogate(
        task.images,
        task.labels,
        torch.cat(logits),
        head.class_names,
        backbone.patch_size,
        adapter=adapter.name,
    )


def compare(
    backbone: Backbone, unseen: LabelledImages, methods: dict[str, Adapter | None], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Every method on the same tasks: accuracy and 95 % interval in percent."""
    unseen = unseen.resize(args.image_size)
    rows: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for n_shot in args.n_shots:
        config = EvaluateConfig(n_way=args.n_way, n_shot=n_shot, n_tasks=args.n_tasks, seed=args.seed)
        tasks = sample_tasks(
            unseen.labels,
            n_way=config.n_way,
            n_shot=n_shot,
            n_query=config.n_query,
            n_tasks=config.n_tasks,
            seed=config.seed,
        )
        for name, adapter in methods.items():
            result = evaluate(backbone, unseen, adapter, config=config, tasks=tasks)
            rows[name][f"{n_shot}-shot"] = {"mean": result.accuracy, "interval": result.interval}
    return rows


def measured(stages: dict[str, dict[str, float]], name: str, work: Callable[[], T]) -> T:
    """Run a stage; note its seconds and the peak of resident (and GPU) memory in GB."""
    reset_peak_memory()
    start = time.perf_counter()
    result = work()
    stages[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak_memory(), 2)}
    if torch.cuda.is_available():
        stages[name]["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    logging.info("%s: %s", name, json.dumps(stages[name]))
    return result


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def print_table(report: dict[str, Any]) -> None:
    print(report["command"])
    print(report["machine"])
    shots = list(next(iter(report["accuracy"].values())))
    print("| method | " + " | ".join(shots) + " |")
    print("| --- |" + " --- |" * len(shots))
    for name, row in report["accuracy"].items():
        print(f"| {name} | " + " | ".join(f"{row[s]['mean']:.2f} ± {row[s]['interval']:.2f}" for s in shots) + " |")
    print("| stage | seconds | peak memory (GB) |\n| --- | --- | --- |")
    for name, stage in report["stages"].items():
        print(f"| {name} | {stage['seconds']} | {stage['peak_gb']} |")


if __name__ == "__main__":
    main()
