"""`lorarecycle recycle` and `lorarecycle warm-start`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import RecycleConfig
from .common import Care, Flat, Machine, Manners, find_backbone, refuse_sources

Preset = Literal["default", "weights", "paper"]


@dataclass(frozen=True)
class Recycle:
    """Distil a folder of adapters into one meta-LoRA."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """PEFT folders or Hub ids, or one folder that holds many."""
    output: Path = Path("meta-lora")
    """Folder to write the meta-LoRA to."""
    layout: str = "timm"
    """Class whose names are written, which PEFT needs to load it: timm, vit (ViTModel), vit-classifier
    (ViTForImageClassification), clip (CLIPModel) and so on, see `Adapter.save`."""
    work_dir: Path | None = None
    """Folder for images and checkpoints; a run stopped there goes on from it. OUTPUT-run under torchrun, whose
    processes share it."""
    report: bool = False
    """Write report.html into --work-dir (OUTPUT-run when that is left out): a page about the run."""
    report_data: str | None = None
    """Labelled images of classes that no adapter has seen, as for `tune`: the report then has the accuracy."""
    plan: bool = False
    """Print what would be done and about how long it takes, and stop."""
    preset: Preset = "default"
    """Where the settings start from: "weights" is our recipe (the default), "paper" LoRA Recycle as published."""
    images: Literal["drawn", "all"] = "drawn"
    """Make only the images that meta-training draws, or all that the settings describe."""
    memory_budget: float | None = None
    """GB of images that may be held in memory; what is more is read from disk. Half of what is free when left out."""
    compile: bool | None = None
    """Run the ViT's blocks through torch.compile; on a GPU, for thousands of steps, when left out."""
    graphs: bool | None = None
    """Launch each step as one CUDA graph; on a GPU only when left out."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[RecycleConfig, Flat] = field(default_factory=RecycleConfig)

    @classmethod
    def of(cls, preset: Preset) -> Recycle:
        """What flags override: the settings of a preset."""
        return cls(adapters=tyro.MISSING, preset=preset, config=RecycleConfig.preset(preset))

    def run(self) -> None:
        from ..adapters.load_many import load_all
        from ..adapters.peft.names import check_layout
        from ..config import as_plain
        from ..pipeline import prepare
        from ..runtime.distributed import launched, leads, leave
        from ..runtime.files import require_place
        from .report import measured_run, tasks_for, write_page

        quiet = self.manners.quiet
        check_layout(self.layout)
        if not self.plan:
            if leads():
                require_place(self.output, "--output", folder=True)
            if self.work_dir is not None:
                require_place(self.work_dir, "--work-dir", folder=True)
        strict = self.care.level
        loaded = load_all(self.adapters[0] if len(self.adapters) == 1 else self.adapters, strict=strict, stored=True)
        refuse_sources(self.output, loaded.folders)
        job = prepare(
            loaded,
            base=find_backbone(self.machine, loaded.adapters),  # adapters are merged before it is cast
            strict=strict,
            preset=self.preset,
            config=self.config,
            device=self.machine.device,
            dtype=self.machine.dtype,
            images=self.images,
            memory_budget=None if self.memory_budget is None else int(1e9 * self.memory_budget),
        )
        config = None if self.report_data is None else tasks_for(self.report_data)
        first = leads()
        if self.plan:
            if first:
                print(job.plan().describe())
            return
        if first and not quiet:
            print(job.plan().describe(), file=sys.stderr)
        work_dir = self.work_dir
        if work_dir is None and (self.report or self.report_data or launched() > 1):
            work_dir = self.output.with_name(f"{self.output.name}-run")
        meta_lora = job.run(work_dir, name=self.output.name, compile=self.compile, graphs=self.graphs, quiet=quiet)
        if not first:
            leave()
            return
        print(meta_lora.save(self.output, layout=self.layout, config=as_plain(self.config), sources=job.adapters))
        if work_dir is not None and (self.report or self.report_data):
            run = measured_run(work_dir, self.report_data, job.backbone, job.adapters, config=config, quiet=quiet)
            print(write_page([run], work_dir / "report.html", job.backbone))
        leave()


@dataclass(frozen=True)
class WarmStart:
    """One adapter with what many have in common, from their weights alone: no images, no training."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """PEFT folders or Hub ids, or one folder that holds many."""
    output: Path = Path("warm-start")
    """Folder to write the adapter to."""
    r: int = 16
    """Rank."""
    gain: float | None = None
    """Factor on the mean of the updates; found from their lengths and likeness when left out."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..adapters.load_many import load_all
        from ..meta.warm_start import warm_start
        from ..runtime.files import require_place

        require_place(self.output, "--output", folder=True)
        strict = self.care.level
        source = self.adapters[0] if len(self.adapters) == 1 else self.adapters
        loaded = load_all(source, strict=strict, stored=True)
        refuse_sources(self.output, loaded.folders)
        adapters = loaded.adapters
        base = find_backbone(self.machine, adapters)
        made = warm_start(
            adapters,
            base=base,
            r=self.r,
            lora_alpha=self.r,
            gain=self.gain,
            name=self.output.name,
            strict=strict,
        )
        print(made.save(self.output, sources=adapters))
