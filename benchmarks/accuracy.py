r"""Few-shot accuracy on CIFAR-FS and EuroSAT: plain ViT, warm start, meta-LoRA from surrogates, from real images.

    python benchmarks/accuracy.py --work-dir work                                         # 8 adapters, one seed
    python benchmarks/accuracy.py --work-dir work --experiments main-8 main-20 --seeds 0 1 2
    python benchmarks/accuracy.py --work-dir work --experiments sparse-25 sparse-50 sparse-75 224px
    python benchmarks/accuracy.py --work-dir work --experiments mixed-ranks ablations
    python benchmarks/accuracy.py --work-dir paper --experiments --preset paper --latent-size 0 --images-per-class 4 \
        --output paper/report.json                                                        # a picture only

Adapters are tuned on 5-way tasks of CIFAR-FS train classes; every method is evaluated on the same tasks of the test
classes (and on EuroSAT, another domain). The bound trains on the adapters' own images, with the paper's loss and as
many steps. All that is finished stays in the work folder and is not done again. Needs cifar_fs.npz, eurosat.npz,
vit_tiny_patch16_224.safetensors and resnet20_cifar10.safetensors in the folder that LORARECYCLE_DATA names
(../shared/data otherwise). Prints tables; writes JSON, the tables and a picture of the surrogates beside it.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fidelity import Bench, Experiment, run_experiment, surrogate_of, tuned_adapters
from lorarecycle.kernels import use_backend
from resnet20 import resnet20_prior
from sets_224 import DATA

from lorarecycle import RecycleConfig
from lorarecycle.config import as_plain
from lorarecycle.report.pictures import draw_surrogates
from lorarecycle.reproduce.stages import Row
from lorarecycle.runtime.device import resolve
from lorarecycle.runtime.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment("main-8"),
        Experiment("main-20", adapters=20),
        Experiment("ablations", ablations=True),
        Experiment("sparse-25", sparsity=0.25),
        Experiment("sparse-50", sparsity=0.5),
        Experiment("sparse-75", sparsity=0.75),
        Experiment("mixed-ranks", ranks=(4, 8)),
        Experiment("224px", image_size=224),
    )
}


def main() -> None:
    args = parse_arguments()
    with use_backend(args.backend):
        run(args)


def run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, dtype = resolve(args.device, args.dtype)
    preset = RecycleConfig.preset(args.preset)
    config = replace(
        preset,
        inversion=replace(
            preset.inversion,
            latent_size=args.latent_size or None,
            **({} if args.images_per_class is None else {"images_per_class": args.images_per_class}),
            **({} if args.candidates is None else {"candidates": args.candidates}),
            **({} if args.inversion_steps is None else {"steps": args.inversion_steps}),
        ),
        meta=replace(preset.meta, **({} if args.meta_steps is None else {"steps": args.meta_steps})),
    )
    prior = resnet20_prior(DATA / "resnet20_cifar10.safetensors").to(device)
    bench = Bench(
        DATA, args.work_dir, device, dtype, config, prior, args.split, tuple(args.n_shots), args.n_tasks, args.epochs
    )
    report: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {device}, {dtype}, torch {torch.__version__}",
        "backend": args.backend,
        "split": args.split,
        "config": as_plain(config),
    }
    earlier = read_json(args.output) if args.output.exists() else {}
    same = all(earlier.get(key) == report[key] for key in report)
    report["experiments"] = earlier["experiments"] if same else {}  # of the same settings: the tables grow
    for name in args.experiments:
        seeds = " ".join(map(str, args.seeds))
        command = f"python benchmarks/accuracy.py --work-dir work --experiments {name} --seeds {seeds}"
        report["experiments"][name] = {"command": command, "rows": run_experiment(bench, EXPERIMENTS[name], args.seeds)}
        write_json(args.output, report)
        write_text(args.output.with_suffix(".md"), tables(report))
    backbone, (adapters, _) = bench.backbone(112), tuned_adapters(bench, Experiment("main-8"))
    surrogates = [surrogate_of(bench, backbone, adapter).masked(0.75) for adapter in adapters[:2]]
    draw_surrogates(surrogates, args.output.with_name(f"surrogates_{args.preset}.png"))
    print(tables(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="*", choices=EXPERIMENTS, default=["main-8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of meta-training")
    parser.add_argument("--preset", choices=("default", "paper"), default="default")
    parser.add_argument("--inversion-steps", type=int, help="the preset's when left out")
    parser.add_argument("--candidates", type=int, help="the preset's when left out")
    parser.add_argument("--meta-steps", type=int, help="the preset's when left out; the bound has as many")
    parser.add_argument("--images-per-class", type=int, help="the preset's when left out")
    parser.add_argument("--latent-size", type=int, default=32, help="CIFAR's photographs have 32; 0: the preset's own")
    parser.add_argument("--epochs", type=int, default=2, help="of tuning an adapter")
    parser.add_argument("--n-shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--n-tasks", type=int, default=600)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="choose settings on val only")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto", help="of the ops, see `lorarecycle.kernels.use_backend`")
    parser.add_argument("--work-dir", type=Path, required=True, help="of one group of settings: keeps all that is done")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy_cifar_fs.json")
    return parser.parse_args()


def tables(report: dict[str, Any]) -> str:
    """All experiments as markdown: mean over the seeds of the accuracy, and the 95 % interval over tasks."""
    lines = [f"{report['machine']}; {report['split']} classes; settings in the JSON file beside this one.", ""]
    for name, experiment in report["experiments"].items():
        rows = experiment["rows"]
        columns = [key for key in next(iter(rows.values()))[0] if key != "seconds"]
        lines += [f"**{name}**: `{experiment['command']}`", "", f"| method | {' | '.join(columns)} | seconds | seeds |"]
        lines.append("| --- |" + " --- |" * (len(columns) + 2))
        for method, runs in rows.items():
            cells = [_cell(runs, column) for column in columns]
            seconds = statistics.mean(run["seconds"]["mean"] for run in runs)
            lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.0f} | {len(runs)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(runs: list[Row], column: str) -> str:
    means = [run[column]["mean"] for run in runs]
    spread = f" ({min(means):.1f} to {max(means):.1f})" if len(means) > 1 else ""
    return f"{statistics.mean(means):.2f} ± {runs[0][column]['interval']:.2f}{spread}"


if __name__ == "__main__":
    main()
