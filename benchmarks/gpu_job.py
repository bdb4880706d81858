"""Seconds of each stage and peak memory of whole jobs: `recycle` of adapters of ViT-B/16, default and paper preset.

    python benchmarks/gpu_job.py --output job.json

Random weights, adapters and, for the prior, a random ResNet-50: what takes time does not depend on them. The paper
preset inverts 4 images a class of 2 adapters, 200 steps, in place of the paper's 100 adapters and 2000 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import timm
import torch

from lorarecycle import Adapter, Backbone, BatchNormPrior, Head
from lorarecycle.pipeline import prepare
from lorarecycle.vit.lora import LoRA

CUDA = torch.cuda.is_available()
DRY_RUN = bool(os.environ.get("LORARECYCLE_DRY_RUN"))


def adapter(backbone: Backbone, seed: int) -> Adapter:
    """An adapter whose update is not zero, with a head of five classes."""
    generator = torch.Generator().manual_seed(seed)
    lora = LoRA.random(backbone, generator=generator)
    for factor in lora.lora_B.parameters():
        factor.data.normal_(0, 0.01, generator=generator)
    head = Head(torch.randn(5, backbone.embed_dim, generator=generator))
    return lora.to_adapter(name=f"task-{seed}", like=backbone, head=head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    name = "vit_tiny_patch16_224" if DRY_RUN else "vit_base_patch16_224"
    backbone = Backbone(timm.create_model(name, num_classes=0), name=name)
    adapters = [adapter(backbone, seed) for seed in range(2 if DRY_RUN else 8)]
    prior = BatchNormPrior(timm.create_model("resnet18" if DRY_RUN else "resnet50", num_classes=5))
    few = {"n_shot": 1, "n_query": 1, "n_way": 2, "steps": 2} if DRY_RUN else {}
    jobs = {
        "default": (adapters, {"pictures": 4} if DRY_RUN else {}, few),
        "paper": (
            adapters[:2],
            {"images_per_class": 2 if DRY_RUN else 20, "steps": 2 if DRY_RUN else 200, "prune": {6: 0.75}},
            few | {"sparsity": 0.75},
        ),
    }
    what = f"`recycle` on {name}: default with {len(adapters)} adapters; paper with 2 and {jobs['paper'][1]}."
    rows = []
    for preset, (chosen, inversion, meta) in jobs.items():
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        job = prepare(
            chosen,
            base=backbone,
            preset=preset,
            inversion=inversion,
            meta=meta,
            prior=prior if preset == "paper" else None,
        )
        job.run(quiet=True)
        seconds = job.seconds | {"everything": time.perf_counter() - start}
        peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
        rows.append({"preset": preset, "seconds": seconds, "peak_memory_GB": peak})
        args.output.write_text(json.dumps({"what": what, "rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
