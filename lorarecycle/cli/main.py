"""The command line: `lorarecycle tune | recycle | evaluate | predict | task-vector | generate | demo`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..config import EvaluateConfig, RecycleConfig, TuneConfig

Flat = tyro.conf.arg(name="")  # the settings' own names as flags, without a prefix


@dataclass(frozen=True)
class Common:
    """Model, machine and manners, the same for every command."""

    base: str | None = None
    """Model: a timm name, a Hub id, a folder, a safetensors file, or "demo"; what the adapters name when left out."""
    weights: Path | None = None
    """Local safetensors weights for the architecture that --base names."""
    image_size: int | None = None
    """Side in pixels that images are resized to; the model's own when left out."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; bfloat16 where the hardware has it."""
    quiet: bool = False
    """Show no progress bars."""


@dataclass(frozen=True)
class Tune:
    """Tune one adapter and its head on labelled images."""

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
    common: Annotated[Common, Flat] = field(default_factory=Common)
    config: Annotated[TuneConfig, Flat] = field(default_factory=TuneConfig)

    def run(self) -> None:
        from .. import tuning
        from ..data import dataset as datasets

        data = datasets.load_dataset(self.data, self.split, download=self.download, quiet=self.common.quiet)
        backbone = _backbone(self.common)
        if self.classes:
            data = data.select_classes(self.classes)
        adapter = tuning.tune(
            backbone,
            data,
            self.config,
            name=self.output.name,
            checkpoints=self.output / "checkpoints" if self.config.save_last else None,
            quiet=self.common.quiet,
        )
        print(adapter.save(self.output, layout=self.layout))


@dataclass(frozen=True)
class Recycle:
    """Distil a folder of adapters into one meta-LoRA."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """PEFT folders or Hub ids, or one folder that holds many."""
    output: Path = Path("meta-lora")
    """Folder to write the meta-LoRA to."""
    work_dir: Path | None = None
    """Folder for surrogates and checkpoints; a run stopped there goes on from it."""
    preset: Literal["default", "paper"] = "default"
    """Where the settings start from: what did best where it was measured, or the paper's own."""
    compile: bool | None = None
    """Run the steps through torch.compile; on a GPU only when left out."""
    common: Annotated[Common, Flat] = field(default_factory=Common)
    config: Annotated[RecycleConfig, Flat] = field(default_factory=RecycleConfig)

    def run(self) -> None:
        import torch

        from .. import pipeline as recycling
        from ..config import as_plain

        pool = recycling.load_adapters(self.adapters[0] if len(self.adapters) == 1 else self.adapters)
        named = next((adapter for adapter in pool if adapter.base_model), None)
        meta_lora = recycling.recycle(
            pool,
            base=_backbone(self.common, named, torch.float32),  # adapters are merged before it is cast
            work_dir=self.work_dir,
            config=self.config,
            device=self.common.device,
            dtype=self.common.dtype,
            name=self.output.name,
            compile=self.compile,
            quiet=self.common.quiet,
        )
        print(meta_lora.save(self.output, config=as_plain(self.config), sources=pool))


@dataclass(frozen=True)
class RecycleAsPublished(Recycle):
    """Distil a folder of adapters into one meta-LoRA, with the paper's settings."""

    preset: Literal["default", "paper"] = "paper"
    config: Annotated[RecycleConfig, Flat] = field(default_factory=RecycleConfig.paper)


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
    common: Annotated[Common, Flat] = field(default_factory=Common)
    config: Annotated[EvaluateConfig, Flat] = field(default_factory=EvaluateConfig)

    def run(self) -> None:
        from ..data import dataset as datasets
        from ..fewshot import evaluate as evaluation
        from ..fewshot import tasks as tasks_module

        meta_lora = _meta_lora(self.meta_lora)
        data = datasets.load_dataset(self.data, self.split, download=self.download, quiet=self.common.quiet)
        tasks = None if self.tasks is None else tasks_module.Tasks.load(self.tasks)
        backbone = _backbone(self.common, meta_lora)
        print(evaluation.evaluate(backbone, data, meta_lora, config=self.config, tasks=tasks, quiet=self.common.quiet))


@dataclass(frozen=True)
class Predict:
    """Classify images from a few labelled ones: prints file, class and probability."""

    support: Path
    """Folder with a sub-folder of images per class."""
    query: tuple[Path, ...]
    """Image files to classify."""
    meta_lora: str | None = None
    """PEFT folder or Hub id; the plain model when left out."""
    common: Annotated[Common, Flat] = field(default_factory=Common)

    def run(self) -> None:
        from ..data.folder import ClassFolders
        from ..fewshot.classifier import FewShotClassifier

        folder = ClassFolders(self.support)
        meta_lora = _meta_lora(self.meta_lora)
        classifier = FewShotClassifier(_backbone(self.common, meta_lora), meta_lora)
        classifier.fit([file for file, _ in folder.samples], [folder.classes[label] for label in folder.targets])
        for file, row in zip(self.query, classifier.predict_proba(list(self.query)), strict=True):
            print(f"{file}\t{classifier.classes_[row.argmax()]}\t{row.max():.4f}")


@dataclass(frozen=True)
class Demo:
    """The whole job in minutes, with a small model and data that come along: no network."""

    output: Path = Path("lorarecycle-demo")
    """Folder for the meta-LoRA, the pictures and the table."""
    seed: int = 0
    """Seed of everything random."""
    quiet: bool = False
    """Show no progress bars."""

    def run(self) -> None:
        from ..demo.demo import run_demo

        print(run_demo(self.output, seed=self.seed, quiet=self.quiet))


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Bad input ends with one line on standard error and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from .generate import Generate, TaskVector

    given = list(sys.argv[1:] if args is None else args)
    as_published = "--preset=paper" in given or ("--preset", "paper") in pairwise(given)
    commands: dict[str, Any] = {
        "tune": Tune,
        "recycle": RecycleAsPublished if as_published else Recycle,
        "evaluate": Evaluate,
        "predict": Predict,
        "task-vector": TaskVector,
        "generate": Generate,
        "demo": Demo,
    }
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(commands, prog="lorarecycle", args=args)
        command.run()
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        print(f"lorarecycle: error: {error}", file=sys.stderr)
        return 2
    return 0


def _backbone(common: Common, adapter: object = None, dtype: Any = None):  # type: ignore[no-untyped-def]
    """The model that the flags name, else the one that the adapter names."""
    from ..runtime.device import resolve
    from ..vit.backbone import Backbone

    base = common.base or getattr(adapter, "base_model", None)
    if not base:
        raise ValueError("`--base` must name the model, got none; see `lorarecycle recycle --help`.")
    device, default = resolve(common.device, common.dtype)
    size = common.image_size
    return Backbone.load(base, weights=common.weights, image_size=size, device=device, dtype=dtype or default)


def _meta_lora(source: str | None):  # type: ignore[no-untyped-def]
    from ..adapters.adapter import Adapter

    return None if source is None else Adapter.load(source)
