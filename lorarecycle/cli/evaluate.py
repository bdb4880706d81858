"""`lorarecycle evaluate` and `lorarecycle predict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..config import EvaluateConfig
from .common import Care, Flat, Machine, Manners, load_images, load_meta_lora


@dataclass(frozen=True)
class Evaluate:
    """Accuracy of a meta-LoRA (or of the plain model) on few-shot tasks, with its 95 % interval."""

    data: Annotated[str, tyro.conf.Positional]
    """As for `tune`; its classes must be unseen by the adapters."""
    meta_lora: str | None = None
    """PEFT folder or Hub id; the plain model when left out."""
    split: str | None = None
    """Part of the data: train, val, test."""
    download: bool = False
    """Fetch a named data set when it is absent."""
    tasks: Path | None = None
    """Task list to use; written by `Tasks.save`."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[EvaluateConfig, Flat] = field(default_factory=EvaluateConfig)

    def run(self) -> None:
        from ..fewshot.evaluate import evaluate
        from ..fewshot.tasks import Tasks

        quiet, meta_lora = self.manners.quiet, load_meta_lora(self.meta_lora)
        tasks = None if self.tasks is None else Tasks.load(self.tasks)
        backbone = self.machine.backbone(meta_lora)
        data = load_images(self.data, self.split, backbone, self.care, self.manners, download=self.download)
        print(evaluate(backbone, data, meta_lora, config=self.config, tasks=tasks, quiet=quiet))


@dataclass(frozen=True)
class Predict:
    """Classify images from a few labelled ones: prints file, class and probability."""

    support: Path
    """Folder with a sub-folder of images per class."""
    query: tuple[Path, ...]
    """Image files to classify."""
    meta_lora: str | None = None
    """PEFT folder or Hub id; the plain model when left out."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..data.folder import ClassFolders, readable
        from ..fewshot.classifier import FewShotClassifier

        support = ClassFolders(self.support, strict=self.care.level)
        queries = readable(self.query) if self.care.level is False else list(self.query)
        meta_lora = load_meta_lora(self.meta_lora)
        classifier = FewShotClassifier(self.machine.backbone(meta_lora), meta_lora)
        names = [support.classes[label] for label in support.targets]
        classifier.fit([file for file, _ in support.samples], names)
        for file, row in zip(queries, classifier.predict_proba(list(queries)), strict=True):
            print(f"{file}\t{classifier.classes_[row.argmax()]}\t{row.max():.4f}")
