"""What can be saved again and again in one place, and how a reader knows a mixture: for kills and many processes."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lorarecycle.export.folder_config import CONFIG
from lorarecycle.export.session import FewShotSession
from timm.models.vision_transformer import VisionTransformer

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.generate import ModelSoup
from lorarecycle.generate.parameters import PeftAdapter
from lorarecycle.runtime.folders import atomic_folder
from lorarecycle.runtime.settled import TornFolderError
from lorarecycle.vit.backbone import Backbone
from lorarecycle.work_dir import RECORD, WorkDir


class Saver(NamedTuple):
    """One kind of saved thing."""

    save: Callable[[Path, int], None]
    """(folder, i): save the i-th version there."""
    read: Callable[[Path], None]
    """Raises AssertionError where what is there is none of the versions, the library's own errors as they come."""


def make_adapter(seed: int, scaling: float, parts: str, pool: str | None) -> Adapter:
    """A small adapter whose files differ from those of the others in every way that an adapter's can."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"blocks.{block}.attn.{part}": LoRAFactors(
            torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator), scaling
        )
        for block in range(3)
        for part in parts
    }
    head = Head(torch.randn(3, 64, generator=generator), torch.zeros(3), ("a", "b", "c"), pool) if pool else None
    return Adapter(factors, head=head, name=f"adapter {seed}")


ADAPTERS = [make_adapter(0, 1, "qv", None), make_adapter(1, 8, "qv", "pooled"), make_adapter(2, 1, "qk", "token")]
ADAPTERS += [make_adapter(3, 2, "qkv", "mean")]
BARE = [
    PeftAdapter({"x.lora_A.weight": torch.full((4, 64), float(i))}, {"peft_type": "LORA", "r": 4, "lora_alpha": i})
    for i in range(1, 5)
]


def save_adapter(folder: Path, i: int) -> None:
    """One of four."""
    ADAPTERS[i % len(ADAPTERS)].save(folder)


def load_adapter(folder: Path) -> None:
    """It is one of the four."""
    found = Adapter.load(folder)
    assert found.digest() in {adapter.digest() for adapter in ADAPTERS}, f"another adapter in {folder}"


def save_bare(folder: Path, i: int) -> None:
    """Bare PEFT parameters."""
    BARE[i % len(BARE)].save(folder)


def load_bare(folder: Path) -> None:
    """Weights and configuration are of one adapter."""
    found = PeftAdapter.load(folder)
    assert found.config["lora_alpha"] == found.tensors["x.lora_A.weight"].max(), f"a mixture in {folder}"


@cache
def soups() -> list[ModelSoup]:
    """Two generators."""
    return [ModelSoup.fit([ADAPTERS[1], ADAPTERS[1]], [torch.ones(3) * i] * 2, quiet=True) for i in (1, 2)]


def save_generator(folder: Path, i: int) -> None:
    """A file in the folder."""
    soups()[i % 2].save(folder / "g.safetensors")


def load_generator(folder: Path) -> None:
    """One of the two."""
    found = ModelSoup.load(folder / "g.safetensors")
    assert found.conditions.tolist() in [soup.conditions.tolist() for soup in soups()]


@cache
def exports() -> tuple[list[Path], list[np.ndarray]]:
    """Two exported models, and what a session answers with each."""
    from lorarecycle.export import export_onnx

    folders, answers = [], []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=0)
        folders.append(Path(tempfile.mkdtemp(prefix="export")))
        export_onnx(Backbone(vit.eval(), name=f"model {seed}"), folders[-1])
        answers.append(answer(folders[-1]))
    assert not np.array_equal(*answers)
    return folders, answers


def answer(folder: Path) -> np.ndarray:
    """Features of one image."""
    return FewShotSession(folder, threads=1).transform(np.full((32, 32, 3), 100, np.uint8))


def save_export(folder: Path, i: int) -> None:
    """As `export_onnx` puts its files in place, without the minutes of an export."""
    with atomic_folder(folder, last=(CONFIG,)) as new:
        for file in exports()[0][i % 2].iterdir():
            shutil.copy(file, new / file.name)


def load_export(folder: Path) -> None:
    """A session opens, and answers as one of the two models."""
    found = answer(folder)
    assert any(np.array_equal(found, known) for known in exports()[1]), f"another model in {folder}"


def open_run(folder: Path, i: int) -> None:
    """A run's folder, which comes and goes."""
    WorkDir(folder).open({"config": 1})
    if i >= 0:
        shutil.rmtree(folder, ignore_errors=True)


def find_run(folder: Path) -> None:
    """A record is whole or absent."""
    if (folder / RECORD).exists():
        WorkDir(folder).open({"config": 1})


SAVERS = {
    "adapter": Saver(save_adapter, load_adapter),
    "bare PEFT": Saver(save_bare, load_bare),
    "generator": Saver(save_generator, load_generator),
    "export": Saver(save_export, load_export),
    "run": Saver(open_run, find_run),
}


def prepare(export: bool) -> None:
    """Make what is slow to make, before processes are forked."""
    soups()
    if export:
        exports()


def forget() -> None:
    """Remove what `prepare` wrote."""
    for folder in exports()[0] if exports.cache_info().currsize else ():
        shutil.rmtree(folder, ignore_errors=True)


def outcome(saver: Saver, folder: Path) -> str:
    """How a read ended; a wrong result or another error than the clear ones is raised."""
    before = folder.exists() and any(path.is_file() for path in folder.glob("[!.]*"))
    try:
        saver.read(folder)
    except TornFolderError as error:
        if str(folder) not in str(error):
            raise AssertionError("an error that does not name the folder") from error
        return "refused"
    except FileNotFoundError as error:
        if before:
            raise AssertionError("files are missing from a folder that was saved") from error
        return "not there yet"
    return "correct"


def show(counts: Counter[str]) -> str:
    """One line."""
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
