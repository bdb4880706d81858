"""How far to amplify what adapters have in common: the warm start's own gain beside fixed ones, on validation classes.

    python benchmarks/warm_start_gain.py --work-dir WORK

Tunes pools of adapters that differ in number, rank and likeness on CIFAR-FS train classes (144 adapters, kept in the
work folder), and tests the warm start of each pool on 600 one-shot tasks of 200 images of each validation class. Needs
cifar_fs.npz and vit_tiny_patch16_224.safetensors in the folder that LORARECYCLE_DATA names (../shared/data otherwise).
Writes benchmarks/results/warm_start_gain.md and .json.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from sets_224 import DATA, vit_tiny

from lorarecycle import Adapter, LabelledImages, MetaConfig, TuneConfig, load_dataset
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.meta.factors import random_factors
from lorarecycle.meta.warm_start import common_gain, start_factors
from lorarecycle.reproduce.stages import draw_class_lists, tuned
from lorarecycle.runtime.files import write_json, write_text
from lorarecycle.runtime.seeds import stream
from lorarecycle.vit.features import extract_features

ROOT = Path(__file__).resolve().parent.parent
GAINS = (1.0, 2.0, 3.0, 4.5, 6.0, 9.0)
IMAGES_PER_CLASS = 200


class Wanted(NamedTuple):
    """An adapter to tune."""

    folder: str
    classes: Sequence[str]
    seed: int
    r: int = 4

    def config(self) -> TuneConfig:
        return TuneConfig(epochs=2, seed=self.seed, r=self.r, lora_alpha=float(self.r))


def pools(train: LabelledImages) -> dict[str, list[Wanted]]:
    """Title -> adapters."""
    tasks = draw_class_lists(train.class_names, 100, 5)
    order = torch.randperm(len(train.class_names), generator=stream(0, "few"))
    few = [train.class_names[i] for i in order[:15]]

    def drawn(i: int, purpose: str, n: int) -> list[str]:
        return [few[j] for j in torch.randperm(n, generator=stream(i, purpose))[:5]]

    usual = [Wanted(f"all/{i}", names, i) for i, names in enumerate(tasks)]
    high = [Wanted(f"r16/{i}", names, 400 + i, 16) for i, names in enumerate(tasks[:8])]
    low = [Wanted(f"r1/{i}", names, 500 + i, 1) for i, names in enumerate(tasks[:8])]
    return {
        **{f"{n}" if n <= 12 else f"{n}, each class several times": usual[:n] for n in (2, 4, 8, 20, 50, 100)},
        "8, tasks of 5 out of 10 classes": [Wanted(f"overlap/{i}", drawn(i, "overlap", 10), 100 + i) for i in range(8)],
        "6, tasks of 5 out of 15 classes": [Wanted(f"mid/{i}", drawn(i, "mid", 15), 300 + i) for i in range(6)],
        "8, from the same random factors": [Wanted(f"start/{i}", names, 600) for i, names in enumerate(tasks[:8])],
        "6, one and the same task": [Wanted(f"same/{i}", few[:5], 200 + i) for i in range(6)],
        "8 of rank 1": low,
        "8 of rank 16": high,
        "4 of rank 16, 4 of rank 1": high[:4] + low[4:],
    }


def rows(work_dir: Path) -> Iterator[dict[str, object]]:
    """Accuracy of each pool by gain; adapters are tuned where they are not in the work folder."""
    train, val = (load_dataset(DATA / "cifar_fs.npz", split) for split in ("train", "val"))
    backbone = vit_tiny(image_size=112)
    kept = torch.cat([(val.labels == c).nonzero()[:IMAGES_PER_CLASS, 0] for c in range(len(val.class_names))])
    tasks = sample_tasks(val.labels[kept], n_way=5, n_shot=1, n_query=15, n_tasks=600, seed=0)

    def accuracy(adapter: Adapter | None) -> float:
        model = backbone if adapter is None else backbone.merge(adapter)
        features = extract_features(model.clone().to(torch.bfloat16), val.images[kept])
        return Evaluation(task_accuracies(features, tasks), tasks).accuracy

    yield {"pool": "plain ViT", "accuracy": {"none": accuracy(None)}}
    like, low_precision = random_factors(backbone, MetaConfig(), 0), backbone.clone().to(torch.bfloat16)
    for title, wanted in pools(train).items():
        adapters = [
            tuned(low_precision, train.select_classes(one.classes), work_dir / one.folder, config=one.config())
            for one in wanted
        ]
        own = common_gain(adapters, like, backbone)
        found = {}
        for name, gain in {"own": own, **{str(g): g for g in GAINS if g <= len(adapters)}}.items():
            found[name] = accuracy(
                start_factors(adapters, like, backbone, gain=gain).to_adapter(name="warm", like=backbone)
            )
        yield {"pool": title, "own_gain": own, "accuracy": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="keep adapters here")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "warm_start_gain.json")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    plain, *found = rows(args.work_dir)
    write_json(args.output, {"machine": machine, "rows": [plain, *found]})
    lines = [
        "# Gain of the warm start",
        "",
        f"`python benchmarks/warm_start_gain.py --work-dir WORK` on {machine}: ViT-Tiny at 112 x 112, adapters of",
        "q and v (rank 4 unless said otherwise), CIFAR-FS validation classes, 600 tasks, 1-shot accuracy in %",
        f"(interval 0.8). The plain ViT has {plain['accuracy']['none']:.2f}. A gain of n is the sum of n adapters;",
        "larger ones are left out.",
        "",
        "| adapters | own gain | accuracy | " + " | ".join(f"gain {g:g}" for g in GAINS) + " |",
        "|" + " --- |" * (3 + len(GAINS)),
    ]
    for row in found:
        cells = [f"{row['accuracy'][str(g)]:.2f}" if str(g) in row["accuracy"] else "" for g in GAINS]
        lines.append(f"| {row['pool']} | {row['own_gain']:.2f} | {row['accuracy']['own']:.2f} | {' | '.join(cells)} |")
    write_text(args.output.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
