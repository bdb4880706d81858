"""`lorarecycle report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..config import EvaluateConfig
from .common import Flat, Machine, Manners

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..report.run import Run
    from ..vit.backbone import Backbone


@dataclass(frozen=True)
class Report:
    """Write one HTML page about a run of `recycle`, or about several side by side: accuracy, images with their masks,
    training, which adapters matter, and the command to repeat it. The page needs no network."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that `recycle --work-dir` filled."""
    output: Path | None = None
    """HTML file to write; report.html in the first run when left out."""
    data: str | None = None
    """Labelled images of classes that no adapter has seen, as for `tune`: accuracy on them is measured and kept."""
    split: str | None = None
    """Part of the data: train, val, test."""
    download: bool = False
    """Fetch a named data set when it is absent."""
    adapters: tuple[str, ...] = ()
    """The adapters that went in, to compare with their average; the baselines made of them are left out otherwise."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[EvaluateConfig, Flat] = field(default_factory=EvaluateConfig)

    def run(self) -> None:
        from ..adapters.load_many import load_all
        from ..report.run import read_run
        from ..runtime.files import require_place

        runs = [read_run(folder) for folder in self.runs]
        if not runs:
            raise ValueError("`runs` must hold at least one run, got none.")
        output = self.output or self.runs[0].expanduser() / "report.html"
        require_place(output, "--output")
        if self.data is not None:  # accuracy is kept there
            for folder in self.runs:
                require_place(folder, "runs", folder=True)
        machine = self.machine
        named = machine.base or machine.weights or machine.image_size
        first = self._base(runs[0]) if named or self.data is not None else None
        if self.data is not None:
            one = self.adapters[0] if len(self.adapters) == 1 else self.adapters
            adapters = load_all(one).adapters if self.adapters else []
            runs = [
                measured_run(
                    folder,
                    self.data,
                    first if first is not None and run is runs[0] else self._base(run),
                    adapters,
                    split=self.split,
                    download=self.download,
                    config=self.config,
                    quiet=self.manners.quiet,
                )
                for folder, run in zip(self.runs, runs, strict=True)
            ]
        print(write_page(runs, output, first if named else None))

    def _base(self, run: Run) -> Backbone:
        from ..runtime.device import resolve
        from ..work_dir import load_base

        own = self.machine
        device, dtype = resolve(own.device, own.dtype)
        found = load_base(run.record, base=own.base, weights=own.weights, image_size=own.image_size, device=device)
        return found.to(dtype)


def tasks_for(data: str) -> EvaluateConfig:
    """Tasks that the data has classes and images for: five-way with 15 queries a class, or fewer, which is said.

    Raises:
        FileNotFoundError, ValueError, ImportError: no such data, fewer than two classes, or too few images of one.
    """
    import logging

    from ..data.sets import open_dataset
    from ..fewshot.evaluate import draw_tasks

    found, usual = open_dataset(data), EvaluateConfig()
    if len(found.class_names) < 2:
        raise ValueError(f"`data` {data} must have at least two classes, got {list(found.class_names)}.")
    config = replace(usual, n_way=min(usual.n_way, len(found.class_names)))
    while True:
        try:
            draw_tasks(found, config, config.seed)
            break
        except ValueError:
            if config.n_query == 1:
                raise
            config = replace(config, n_query=config.n_query - 1)
    if config.n_query < usual.n_query:
        text = "%s has images for %d queries of each class in a task, not %d: accuracy is measured on these"
        logging.getLogger(__name__).warning(text, data, config.n_query, usual.n_query)
    return config


def measured_run(
    folder: Path,
    data: str | None,
    backbone: Backbone,
    adapters: Sequence[Adapter] = (),
    *,
    split: str | None = None,
    download: bool = False,
    config: EvaluateConfig | None = None,
    quiet: bool = False,
) -> Run:
    """A run with its accuracy on the data, where data is named; arguments as in `measure_run`."""
    from ..data.load import load_dataset
    from ..report.measure import measure_run
    from ..report.run import read_run

    if data is None:
        return read_run(folder)
    images = load_dataset(data, split, download=download, mixed=backbone.fit, quiet=quiet)
    measure_run(read_run(folder), backbone, images, adapters=adapters, config=config, name=data, quiet=quiet)
    return read_run(folder)


def write_page(runs: Sequence[Run], output: Path, backbone: Backbone | None) -> Path:
    """`write_report`; the file."""
    from ..report.page import write_report

    return write_report(runs, output, backbone=backbone)
