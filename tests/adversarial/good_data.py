"""Data sets, images, few-shot files and an exported model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from good import BASE, CLASSES, D, normalisation, numbers
from lorarecycle.export import export_onnx
from lorarecycle.export.session import FewShotSession
from PIL import Image

from lorarecycle.data.dataset import LabelledImages
from lorarecycle.data.decode import decode
from lorarecycle.fewshot.prototype_files import read_prototypes, write_prototypes
from lorarecycle.fewshot.tasks import Tasks, sample_tasks


def make_prototypes(folder: Path) -> None:
    """Both formats."""
    for suffix in (".npz", ".safetensors"):
        write_prototypes(folder / f"p{suffix}", numbers(3, D).numpy(), np.array(CLASSES), "m" * 64)


def read_both_prototypes(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of both formats."""
    return [read_prototypes(folder / f"p{suffix}", "m" * 64, D) for suffix in (".npz", ".safetensors")]


def prototypes_legal(_: Path, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Other numbers or names, as many of the one as of the other."""
    for centres, classes in found:
        assert centres.dtype == np.float32
        assert centres.shape == (len(classes), D)
        assert np.isfinite(centres).all()
        assert classes.ndim == 1


def make_tasks(folder: Path) -> None:
    """A task list."""
    sample_tasks(torch.arange(40) % 4, n_way=3, n_shot=2, n_query=2, n_tasks=5, seed=0).save(folder / "t.npz")


def tasks_legal(_: Path, found: Tasks) -> None:
    """Indices."""
    for part in (found.classes, found.support, found.query):
        assert part.dtype == torch.int64
        assert part.min() >= 0
    assert found.n_shot >= 1
    assert found.n_query >= 1


def make_npz(folder: Path) -> None:
    """A data set."""
    pixels = (numbers(6, 8, 8, 3) * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()
    parts = {"train_images": pixels, "train_labels": np.arange(6) % 3, "train_classes": np.array(CLASSES)}
    np.savez(folder / "d.npz", **parts)  # type: ignore[arg-type]


def data_legal(_: Path, found: LabelledImages) -> None:
    """`LabelledImages` checks itself; a row for each image."""
    assert found.images.shape[0] == found.labels.shape[0]
    assert found.images.dtype == torch.uint8
    assert int(found.labels.max()) < len(found.class_names) if len(found.labels) else True


def make_parquet(folder: Path) -> None:
    """A set of Hugging Face's form."""

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for i in range(4):
        with io.BytesIO() as file:
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(file, "png")
            rows.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), folder / "train.parquet")


IMAGES = ("a.png", "a.jpg", "a.gif", "a.tif", "a.webp", "a.bmp", "a.ppm", "i16.png", "p.png", "exif.jpg")


def make_images(folder: Path) -> None:
    """Ten files, small."""
    pixels = Image.fromarray((numbers(12, 9, 3) * 40 + 128).clamp(0, 255).to(torch.uint8).numpy())
    for name in IMAGES[:7]:
        pixels.save(folder / name)
    Image.fromarray(np.arange(108, dtype=np.uint16).reshape(12, 9) * 500).save(folder / "i16.png")
    pixels.convert("P").save(folder / "p.png", transparency=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(folder / "exif.jpg", exif=exif)


def read_images(folder: Path) -> list[np.ndarray]:
    """Each of them."""
    return [next(iter(decode(folder / name))) for name in IMAGES]


def images_legal(_: Path, found: list[np.ndarray]) -> None:
    """Other pixels, of the right kind; Pillow reads some damaged files as what is left of them."""
    for pixels in found:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 4
        assert pixels.shape[:2] == (1, 3)


def make_export(folder: Path) -> None:
    """The ONNX files of a small model."""
    export_onnx(BASE(), folder)


def read_export(folder: Path) -> Any:
    """Answers of a session."""
    session = FewShotSession(folder, threads=1)
    images = (numbers(4, 32, 32, 3) * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()
    return session.fit(images[:2], ["a", "b"]).predict_proba(images), session.config


def export_legal(_: Path, found: Any) -> None:
    """config.json may say another preparation; files of the model may not be others."""
    answers, config = found
    assert answers.shape == (4, 2)
    assert np.isfinite(answers).all()
    normalisation(config["mean"], config["std"])
