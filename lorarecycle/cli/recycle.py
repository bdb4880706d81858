"""`lorarecycle recycle` and `lorarecycle warm-start`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import RecycleConfig
from .common import Flat, Machine, Manners

Preset = Literal["default", "weights", "paper"]


@dataclass(frozen=True)
class Recycle:
    """Distil a folder of adapters into one meta-LoRA."""

    adapters: Annotated[tuple[str, ...], tyro.conf.Positional]
    """PEFT folders or Hub ids, or one folder that holds many."""
    output: Path = Path("meta-lora")
    """Folder to write the meta-LoRA to."""
    work_dir: Path | None = None
    """Folder for images and checkpoints; a run stopped there goes on from it."""
    plan: bool = False
    """Print what would be done and about how long it takes, and stop."""
    preset: Preset = "default"
    """Where the settings start from: "weights" is our recipe (the default), "paper" LoRA Recycle as published."""
    compile: bool | None = None
    """Run the ViT's blocks through torch.compile; on a GPU only when left out."""
    graphs: bool | None = None
    """Launch each step as one CUDA graph; on a GPU only when left out."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[RecycleConfig, Flat] = field(default_factory=RecycleConfig)

    @classmethod
    def of(cls, preset: Preset) -> Recycle:
        """What flags override: the settings of a preset."""
        return cls(adapters=tyro.MISSING, preset=preset, config=RecycleConfig.preset(preset))

    def run(self) -> None:
        import torch

        from ..adapters.load_many import load_adapters
        from ..config import as_plain
        from ..pipeline import prepare

        quiet = self.manners.quiet
        adapters = load_adapters(self.adapters[0] if len(self.adapters) == 1 else self.adapters)
        named = next((adapter for adapter in adapters if adapter.base_model), None)
        job = prepare(
            adapters,
            base=self.machine.backbone(named, torch.float32),  # adapters are merged before it is cast
            preset=self.preset,
            config=self.config,
            device=self.machine.device,
            dtype=self.machine.dtype,
        )
        if self.plan:
            print(job.plan().describe())
            return
        if not quiet:
            print(job.plan().describe(), file=sys.stderr)
        meta_lora = job.run(self.work_dir, name=self.output.name, compile=self.compile, graphs=self.graphs, quiet=quiet)
        print(meta_lora.save(self.output, config=as_plain(self.config), sources=job.adapters))


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
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        import torch

        from ..adapters.load_many import load_adapters
        from ..meta.warm_start import warm_start

        adapters = load_adapters(self.adapters[0] if len(self.adapters) == 1 else self.adapters)
        named = next((adapter for adapter in adapters if adapter.base_model), None)
        base = self.machine.backbone(named, torch.float32)
        made = warm_start(adapters, base=base, r=self.r, lora_alpha=self.r, gain=self.gain, name=self.output.name)
        print(made.save(self.output, sources=adapters))
