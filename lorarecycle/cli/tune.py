"""`lorarecycle tune`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import TuneConfig
from .common import Flat, Machine, Manners


@dataclass(frozen=True)
class Tune:
    """Tune one adapter and its head on labelled images. A tuning that was stopped goes on where it was."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder with a sub-folder of images per class, a npz file, or cifar-fs, flowers102, eurosat, digits."""
    output: Path
    """Folder to write the PEFT adapter to."""
    classes: tuple[str, ...] = ()
    """Classes to tune on; all when left out."""
    split: str | None = None
    """Part of the data: train, val, test."""
    download: bool = False
    """Fetch a named data set when it is absent."""
    layout: Literal["timm", "vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model"] = "timm"
    """Module names to write: timm's, or those of a transformers model type."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[TuneConfig, Flat] = field(default_factory=TuneConfig)

    def run(self) -> None:
        from ..data.dataset import load_dataset
        from ..tuning import tune

        data = load_dataset(self.data, self.split, download=self.download, quiet=self.manners.quiet)
        backbone = self.machine.backbone()
        if self.classes:
            data = data.select_classes(self.classes)
        output = Path(os.path.abspath(self.output))
        checkpoint = output.with_name(f".{output.name}.tuning.safetensors")
        adapter = tune(
            backbone,
            data,
            config=self.config,
            name=self.output.name,
            checkpoint=checkpoint,
            checkpoints=self.output / "checkpoints" if self.config.save_last else None,
            quiet=self.manners.quiet,
        )
        saved = adapter.save(self.output, layout=self.layout)
        checkpoint.unlink(missing_ok=True)
        print(saved)
