"""One run of `recycle` on many tiny adapters in a process of its own: seconds of each stage and peak memory, as JSON.

    python benchmarks/scale_job.py --adapters 100 --folder adapters-100

The ViT has 3 blocks of width 32 and reads 32 x 32 images; adapters have rank 4, random factors and 5 classes. They are
written by a process of their own where the folder does not hold them yet. One thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from timm.models.vision_transformer import VisionTransformer

from lorarecycle import Adapter, Backbone, Head
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.pipeline import prepare
from lorarecycle.runtime.distributed import join, launched, leave
from lorarecycle.runtime.files import write_text


def tiny_backbone() -> Backbone:
    """A ViT of 3 blocks and width 32, the same in each process."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    return Backbone(VisionTransformer(**sizes), name="tiny")


def make_adapter(seed: int, *, blocks: int = 3, width: int = 32, size: float = 0.2, classes: int = 5) -> Adapter:
    """A random one of rank 4 at q and v; without a head for no classes."""
    g = torch.Generator().manual_seed(seed)
    factors = {
        f"blocks.{block}.attn.{part}": LoRAFactors(
            torch.randn(4, width, generator=g) * size, torch.randn(width, 4, generator=g) * size, 1.0
        )
        for block in range(blocks)
        for part in "qv"
    }
    names = tuple(f"class {seed}.{c}" for c in range(classes))
    head = Head(torch.randn(classes, width, generator=g), class_names=names) if classes else None
    return Adapter(factors, head, base_model="tiny", name=f"adapter-{seed:05d}")


def write_adapters(folder: Path, n: int) -> None:
    """Those that are not there yet; `complete` says that all are."""
    for seed in range(n):
        target = folder / f"adapter-{seed:05d}"
        if not target.exists():
            make_adapter(seed).save(target)
    write_text(folder / "complete", f"{n}\n")


def peak_bytes() -> int:
    """Most memory that this process has had in RAM."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of the run: the default preset, or inversion and episodes."""
    meta: dict[str, Any] = {"steps": options.steps, "episodes_per_step": options.episodes}
    if options.default:
        return {"meta": meta}
    inversion = {"steps": options.inversion_steps, "init": "noise", "prior": None}
    return {"preset": "paper", "inversion": inversion, "meta": meta}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10, help="how many")
    parser.add_argument("--folder", type=Path, required=True, help="where they are, or will be")
    parser.add_argument("--steps", type=int, default=100, help="of meta-training")
    parser.add_argument("--episodes", type=int, default=1, help="of each step")
    parser.add_argument("--inversion-steps", type=int, default=10, help="of each batch of images")
    parser.add_argument("--images", choices=["drawn", "all"], default="drawn", help="which images are made")
    parser.add_argument("--default", action="store_true", help="the default preset, which inverts nothing")
    parser.add_argument("--memory-budget", type=int, default=0, help="bytes of images held in memory")
    parser.add_argument("--work-dir", type=Path, help="folder of the run; a temporary one when left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.folder / "complete").exists():
        writer = multiprocessing.get_context("spawn").Process(
            target=write_adapters, args=(options.folder, options.adapters)
        )
        writer.start()
        writer.join()
    before, started, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    job = prepare(
        options.folder,
        base=tiny_backbone(),
        device="cpu",
        dtype="float32",
        images=options.images,
        memory_budget=options.memory_budget,
        **settings(options),
    )
    prepared = time.perf_counter()
    job.run(options.work_dir, quiet=True)
    ended, used = time.perf_counter(), time.process_time() - cpu
    device = torch.device("cpu")
    group, everyone = join(device), torch.zeros(launched())
    everyone[group.rank] = used
    group.add(everyone)
    leave()
    if not group.leads:
        return
    seconds = {"read": prepared - started, **job.seconds, "whole": ended - started}
    print(
        json.dumps(
            {
                "adapters": len(job.adapters),
                "images": 0 if job.drawn is None else len(job.drawn.rows),
                "images_described": 0 if job.drawn is None else job.drawn.total,
                "peak_mb": round(peak_bytes() / 1e6, 1),
                "before_mb": round(before / 1e6, 1),
                "cpu_seconds": round(float(everyone.sum()), 2),
                "busiest": round(float(everyone.max()), 2),
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
