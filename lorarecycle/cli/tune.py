"""`lorarecycle tune`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..config import TuneConfig
from .common import Care, Flat, Machine, Manners


@dataclass(frozen=True)
class Tune:
    """Tune one adapter and its head on labelled images. A tuning that was stopped goes on where it was."""

    data: Annotated[str, tyro.conf.Positional]
    """A folder with a sub-folder of images per class, a npz file, a folder of parquet files, owner/name of the Hugging
    Face Hub, or cifar-fs, flowers102, eurosat, digits."""
    output: Path
    """Folder to write the PEFT adapter to."""
    classes: tuple[str, ...] = ()
    """Classes to tune on; all when left out."""
    split: str | None = None
    """Part of the data: train, val, test."""
    download: bool = False
    """Fetch a named data set when it is absent."""
    layout: str = "timm"
    """Class whose names are written, which PEFT needs to load it: timm, vit, vit-classifier and so on, see
    `Adapter.save`."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[TuneConfig, Flat] = field(default_factory=TuneConfig)

    def run(self) -> None:
        from ..adapters.peft.names import check_layout
        from ..data.sets import open_dataset
        from ..runtime.files import require_place
        from ..tuning import tune

        check_layout(self.layout)
        require_place(self.output, "--output", folder=True)
        backbone = self.machine.backbone()
        data = open_dataset(self.data, self.split, download=self.download, strict=self.care.level)
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
