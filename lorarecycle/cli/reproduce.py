"""`lorarecycle reproduce`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from .common import Flat, Machine, Manners


@dataclass(frozen=True)
class Reproduce:
    """Run a table or a figure of the papers, or an experiment file of your own, cell by cell. What is done stays in the
    work folder and is not done again."""

    table: Annotated[str, tyro.conf.Positional] = "list"
    """table1 to table18, figure5, figure8, figure9 of LoRA Recycle, icm1 to icm6 of ICM-LoRA, methods, own, or a JSON
    file; `list` names them."""
    data: Path | None = None
    """Folder that holds the data sets."""
    work_dir: Path = Path("reproduced")
    """Keeps adapters, images and results; tables of one base share them."""
    plan: bool = False
    """Say what it will cost, and do nothing."""
    quick: bool = False
    """Rehearse at small size: a tiny ViT, drawn images, few steps. What comes out are no results."""
    copy: Path | None = None
    """Write the experiment's file here, to be changed, and do nothing."""
    prior: str | None = None
    """Batch-norm network of the inversion: a timm name or a safetensors file."""
    prior_weights: Path | None = None
    """Local weights of that network."""
    text_encoder: str | None = None
    """Folder or Hub id of a CLIP model, for what reads class names."""
    n_tasks: int | None = None
    """Tasks of each cell in place of the file's."""
    cheapest_first: bool = False
    """Run the cells that cost least first, by the estimates of --plan."""
    skip_missing: bool = False
    """Mark cells whose data sets or texts are not there as not run, instead of stopping."""
    workers: int = 1
    """Threads that read images."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..reproduce.experiment import experiment_names, experiment_text, load_experiment
        from ..reproduce.planning import cheapest_first, plan_run
        from ..reproduce.prepare import prepare_run
        from ..reproduce.run import CellsFailed
        from ..runtime.files import require_place, write_text

        if self.table == "list":
            if self.copy is not None:
                raise ValueError("`--copy` must come with the table whose file is wanted, got none.")
            for name in experiment_names():
                print(f"{name:10} {load_experiment(name).title}")
            return
        if self.copy is not None:
            if self.copy.expanduser().exists():
                raise FileExistsError(f"`--copy` must name a new file, got {self.copy}; choose another or delete it.")
            require_place(self.copy, "--copy")
            print(write_text(self.copy, experiment_text(self.table)))
            return
        if not self.plan:
            require_place(self.work_dir, "--work-dir", folder=True)
        machine = self.machine
        run = prepare_run(
            self.table,
            data=self.data,
            work_dir=self.work_dir,
            base=machine.base,
            weights=machine.weights,
            prior=self.prior,
            prior_weights=self.prior_weights,
            text_encoder=self.text_encoder,
            n_tasks=self.n_tasks,
            image_size=machine.image_size,
            device=machine.device,
            dtype=machine.dtype,
            quick=self.quick,
            skip_missing=self.skip_missing,
            workers=self.workers,
            quiet=self.manners.quiet,
        )
        if self.plan:
            print(plan_run(run))
            return
        run.order = cheapest_first if self.cheapest_first else None
        failures: list[str] = []
        try:
            path = run()
        except CellsFailed as error:
            path, failures = error.table, error.failures
        print(path.read_text(encoding="utf-8"))
        print(path)
        if failures:
            print("\n".join(["lorarecycle: cells failed:", *failures]), file=sys.stderr)
            raise SystemExit(1)
