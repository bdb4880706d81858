"""The whole job in two minutes: six adapters of digits over photographs and a small ViT come along; no network."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from ..adapters.load_many import load_adapters
from ..config import InversionConfig, MetaConfig, RecycleConfig
from ..data.dataset import LabelledImages
from ..data.load import load_dataset
from ..inversion.surrogate import Surrogate
from ..pipeline import prepare
from ..report.measure import measure_run
from ..report.page import write_report
from ..report.pictures import draw_losses, draw_surrogates
from ..report.run import read_run
from ..runtime.files import write_json, write_text
from ..runtime.progress import Stopwatch
from ..runtime.seeds import stream
from ..vit.backbone import Backbone
from ..work_dir import WorkDir

ADAPTERS = Path(__file__).parent / "adapters"
"""PEFT folders that come along; each knows five of the digits 0 to 5. `benchmarks/tune_demo_adapters.py` made them."""
UNSEEN = ("6", "7", "8", "9")
"""Digits that no adapter knows."""
RECYCLE = RecycleConfig(
    InversionConfig(pictures=240, prune={2: 0.5}),
    MetaConfig(n_way=3, n_query=9, flip=False, warm_start_gain=1.5),
)
"""The gain was chosen with adapters of three of the digits 0 to 5, on tasks of the other three."""
TASKS_OF_EACH = 600
"""Few-shot tasks of an evaluation."""
BRIGHTNESS = 0.4
"""Of the photographs that the digits lie on."""


def run_demo(output: str | PathLike[str], *, seed: int = 0, quiet: bool = False) -> str:
    """Recycle the adapters that come along, and compare on the digits that none of them has seen.

    Args:
        output: folder for the meta-LoRA, the pictures, the report and the table; a run stopped there goes on.
        seed: of everything random.
        quiet: show no progress bars.

    Returns:
        the report: a table, where the files are, and what to run next.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    output, clock = Path(output).expanduser(), Stopwatch()
    digits = on_photographs(load_dataset("digits", size=32), seed)
    backbone = Backbone.load("demo")
    adapters = load_adapters(ADAPTERS)
    job = prepare(adapters, base=backbone, config=RECYCLE, seed=seed)
    meta_lora = job.run(output / "work", quiet=quiet)
    meta_lora.save(output / "meta_lora", sources=adapters)
    clock.laps |= {f"recycle: {name}": seconds for name, seconds in job.seconds.items()}
    clock.restart()

    work = WorkDir(output / "work")
    draw_surrogates([Surrogate.load(work.pictures)], output / "surrogates.png")
    draw_losses(work.losses, output / "training_curve.png")
    clock.lap("draw")

    measured = measure_run(
        read_run(output / "work"),
        backbone,
        digits.select_classes(UNSEEN),
        adapters=adapters,
        config={"n_way": len(UNSEEN), "n_tasks": TASKS_OF_EACH, "seed": seed},
        name="digits over photographs",
        quiet=True,
    )
    clock.lap("evaluate")
    write_report([output / "work"], output / "report.html", backbone=backbone)
    clock.lap("report")
    write_json(output / "accuracy.json", measured["rows"])
    report = _report(measured["rows"], len(adapters), clock.laps, output)
    write_text(output / "report.txt", report + "\n")
    return report


def on_photographs(digits: LabelledImages, seed: int) -> LabelledImages:
    """Each digit in front of a random piece of one of the two photographs that scikit-learn carries.

    The ViT was made for nothing like it, so what adapters have to tell has much in common. After MNIST-M (Ganin et al.
    2016).
    """
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    generator = stream(seed, "photographs")
    side = digits.images.shape[-1]
    pieces = []
    for _ in range(len(digits)):
        photo = photos[int(torch.randint(len(photos), (), generator=generator))]
        top, left = (int(torch.randint(n - 2 * side, (), generator=generator)) for n in photo.shape[1:])
        pieces.append(photo[:, top : top + 2 * side : 2, left : left + 2 * side : 2])
    ground = (BRIGHTNESS * torch.stack(pieces)).to(torch.uint8)
    return LabelledImages(torch.maximum(digits.images, ground), digits.labels, digits.class_names)


def _report(rows: dict[str, dict[str, dict[str, float]]], count: int, laps: dict[str, float], output: Path) -> str:
    width = max(map(len, rows))
    head = f"{'accuracy in %':{width}}   1-shot          5-shot"
    lines = [head, "-" * len(head)]
    for name, row in rows.items():
        figures = [f"{one['accuracy']:5.2f} ± {one['interval']:.2f}" for one in row.values()]
        lines.append(f"{name:{width}}   " + "   ".join(figures))
    return "\n".join(
        [
            f"{count} adapters of the digits 0 to 5 over photographs, recycled without their images. {TASKS_OF_EACH} "
            f"tasks of the digits {', '.join(UNSEEN)}, which none of them has seen:",
            "",
            *lines,
            "",
            "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in laps.items()),
            "",
            f"meta-LoRA            {output / 'meta_lora'}",
            f"painted pictures     {output / 'surrogates.png'}",
            f"training curve       {output / 'training_curve.png'}",
            f"report               {output / 'report.html'}   (open it in a browser)",
            "",
            "next, with your own adapters and photos:",
            "  lorarecycle recycle FOLDER_OF_ADAPTERS --base vit_base_patch16_224 --output my-meta-lora",
            "  lorarecycle predict --base vit_base_patch16_224 --meta-lora my-meta-lora --support PHOTOS_BY_CLASS "
            "--query NEW.jpg",
        ]
    )
