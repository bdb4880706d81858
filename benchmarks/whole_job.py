"""Seconds of a whole job, `recycle` of 8 adapters, beside the accuracy that it reaches, by steps of meta-training.

    python benchmarks/accuracy.py --work-dir work     # tunes the adapters
    python benchmarks/whole_job.py --work-dir work

From reading the adapters to the meta-LoRA; the backbone is there. ViT-Tiny at 112 px, 600 5-way 1-shot tasks of the
test classes of CIFAR-FS. Needs the data of `accuracy.py`. Prints a table and writes it, as JSON too.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
from sets_224 import DATA, vit_tiny

from lorarecycle import evaluate, load_dataset, recycle
from lorarecycle.runtime.device import resolve
from lorarecycle.runtime.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    args = parse_arguments()
    device, dtype = resolve("auto", "auto")
    backbone = vit_tiny(image_size=112, device=device)
    unseen = load_dataset(DATA / "cifar_fs.npz", "test").resize(112)
    folders = [args.work_dir / "adapters" / f"task-{i}" for i in range(8)]
    rows = []
    for steps in args.meta_steps:
        start = time.perf_counter()
        meta_lora = recycle(folders, base=backbone, inversion={"latent_size": 32}, meta={"steps": steps})
        seconds = time.perf_counter() - start
        found = evaluate(backbone.clone().to(dtype), unseen, meta_lora, config={"distance": "euclidean"})
        rows.append({"steps": steps, "seconds": seconds, "mean": found.accuracy, "interval": found.interval})
        print(rows[-1], flush=True)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {device}, {dtype}, torch {torch.__version__}"
    )
    write_json(args.output, {"machine": machine, "rows": rows})
    lines = [f"`python benchmarks/whole_job.py --work-dir work` on {machine}", ""]
    lines += ["| steps of meta-training | seconds, everything | 1-shot |", "| --- | --- | --- |"]
    lines += [f"| {r['steps']} | {r['seconds']:.1f} | {r['mean']:.2f} ± {r['interval']:.2f} |" for r in rows]
    write_text(args.output.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="work folder of accuracy.py")
    parser.add_argument("--meta-steps", type=int, nargs="+", default=[0, 25, 50, 100], help="a whole job for each")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "whole_job.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
