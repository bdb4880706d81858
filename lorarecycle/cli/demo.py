"""`lorarecycle demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from .common import Flat, Manners


@dataclass(frozen=True)
class Demo:
    """The whole job in minutes, with a small model and data that come along: no network."""

    output: Path = Path("lorarecycle-demo")
    """Folder for the meta-LoRA, the pictures and the table."""
    seed: int = 0
    """Seed of everything random."""
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..demo.demo import run_demo
        from ..runtime.files import require_place

        require_place(self.output, "--output", folder=True)
        print(run_demo(self.output, seed=self.seed, quiet=self.manners.quiet))
