"""What the processes of a test run: `recycle` on tiny adapters, under torchrun or alone.

    torchrun --standalone --nproc-per-node 2 tests/distributed/job.py FOLDER {guide,episodes,long}

Rank 0 writes FOLDER/NAME.safetensors: the updates and the losses.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scale_job import make_adapter, tiny_backbone

from lorarecycle import InversionConfig, LabelledImages, MetaConfig, RecycleConfig, evaluate, recycle
from lorarecycle.runtime.distributed import join, leads, leave
from lorarecycle.runtime.files import save_tensors

INVERSION = InversionConfig(images_per_class=4, batch_size=5, steps=4, init="noise", prior=None)
SETTINGS = {
    "guide": RecycleConfig(INVERSION, MetaConfig(steps=6, n_query=1, guide_weight=1.0)),
    "long": RecycleConfig(
        replace(INVERSION, images_per_class=3, steps=60),
        MetaConfig(steps=150, n_query=2, guide_weight=0.25, episodes_per_step=2),
    ),
    "episodes": RecycleConfig(
        INVERSION, MetaConfig(steps=6, n_query=2, guide_weight=0.25, episodes_per_step=4, resolutions=(8, 32))
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=sorted(SETTINGS))
    parser.add_argument("--budget", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapters = [make_adapter(i) for i in range(6)]
    for name in options.names:
        work = options.folder / f"work-{name}"
        found = recycle(
            adapters,
            base=tiny_backbone(),
            config=SETTINGS[name],
            work_dir=work,
            memory_budget=options.budget,
            device="cpu",
            dtype="float32",
            quiet=True,
        )
        images = torch.randint(256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        data = LabelledImages(images, torch.arange(24) % 6, tuple("abcdef"))
        measured = evaluate(
            tiny_backbone(),
            data,
            found,
            config={"n_way": 3, "n_query": 2, "n_tasks": 7},
            group=join(torch.device("cpu")),
            quiet=True,
        ).accuracies
        if leads():
            losses = [float(line.split(",")[1]) for line in (work / "losses.csv").read_text().splitlines()[1:]]
            updates = {site: found.delta(site) for site in found.sites}
            save_tensors(
                options.folder / f"{name}.safetensors",
                {**updates, "losses": torch.tensor(losses), "accuracies": measured},
            )
    sys.stdout.write(f"rank {os.environ.get('RANK', '0')} is done\n")
    sys.stdout.flush()
    leave()


if __name__ == "__main__":
    main()
