"""`reproduce`: an experiment's cells one after the other, each kept; results as JSON and as a table."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..config import InversionConfig
from ..inversion.prior import BatchNormPrior
from ..runtime.device import resolve
from ..runtime.files import read_json, write_json, write_text
from ..runtime.progress import track
from ..runtime.version import __version__
from ..vit.backbone import Backbone
from .experiment import Column, Experiment, Row, load_experiment
from .facts import Facts
from .images import draw_grid, draw_map, draw_shots
from .kinds import cell_facts, find_kind
from .quick import Letters, drawn_set, drawn_text, shrink, tiny_backbone, tiny_prior
from .sets import SetMissing, Sets
from .settings import Settings, check_settings, key_of, merge
from .table import markdown
from .world import World

logger: logging.Logger = logging.getLogger(__name__)

WRITE_EVERY = 30.0
"""Seconds between tables that are written on the way."""
TOLD = (FileNotFoundError, TypeError, ImportError, ValueError)
"""Errors of a cell's preparation that say in which cell they are."""


class CellsFailed(RuntimeError):
    """Cells of a run failed; the others are done.

    Attributes:
        table: file of what is done.
        failures: a line for each.
    """

    def __init__(self, table: Path, failures: list[str]) -> None:
        super().__init__("; ".join([f"{len(failures)} cells failed", *failures]))
        self.table = table
        self.failures = failures


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        row, column: where it stands.
        asked: settings, as the file says.
        settings: those that it runs with; smaller in a rehearsal.
        takes_weights: they are those of the run's arguments.
        missing: why it cannot run, where that is put up with.
        facts: what it hangs on.
        key: names its file; equal for cells of equal facts, empty where it cannot run.
    """

    row: Row
    column: Column
    asked: Settings
    settings: Settings
    takes_weights: bool = False
    missing: str = ""
    facts: Facts = field(default_factory=dict)
    key: str = ""


@dataclass
class Run:
    """An experiment that is ready to run: everything is known and checked.

    Attributes:
        experiment: what is run.
        world: where.
        cells: row after row.
        quick: a rehearsal.
        machine: in words.
        order: of the cells that are left; column after column when None.
    """

    experiment: Experiment
    world: World
    cells: list[Cell]
    quick: bool
    machine: str
    order: Callable[[Run], list[Cell]] | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the table is written."""
        return self.world.work / self.experiment.name

    def path(self, cell: Cell) -> Path:
        """Where a cell's result is kept; tables share cells."""
        return self.world.work / "cells" / f"{cell.key}.json"

    def todo(self) -> list[Cell]:
        """Cells without a result, each once, those of a column together."""
        order = {column.name: i for i, column in enumerate(self.experiment.columns)}
        cells = sorted(self.cells, key=lambda cell: order[cell.column.name])
        found = {cell.key: cell for cell in reversed(cells) if not cell.missing and not self.path(cell).exists()}
        return list(reversed(list(found.values())))

    def __call__(self) -> Path:
        """Run what is not there yet; the table's file.

        Raises:
            CellsFailed: cells that failed, once all others are done; they are tried again by the next call.
        """
        self.failed.clear()
        write_json(self.world.work / "settings.json", {"quick": self.quick, "machine": self.machine})
        written = time.perf_counter()
        cells = self.todo() if self.order is None else self.order(self)
        for cell in track(cells, self.experiment.name, unit="cells", quiet=self.world.quiet):
            try:
                result = find_kind(cell.settings).run(self.world, cell.settings)
            except Exception as error:  # out of memory, say: the other cells are worth having
                reason = " ".join(str(error).split()) or "no reason given"
                self.failed[cell.key] = f"{cell.row.name}, {cell.column.name}: {type(error).__name__}: {reason}"
                logger.error("failed: %s", self.failed[cell.key])
                logger.debug("failed: %s", cell.row.name, exc_info=True)
                continue
            write_json(self.path(cell), {"facts": cell.facts, "result": result})
            logger.info("%s, %s: %s", cell.row.name, cell.column.name, result)
            if time.perf_counter() - written > WRITE_EVERY:
                self.write()
                written = time.perf_counter()
        table = self.write()
        self.draw()
        if self.failed:
            raise CellsFailed(table, list(self.failed.values()))
        return table

    def results(self) -> Iterator[tuple[Cell, dict[str, Any] | None]]:
        """Every cell with its result, None where there is none."""
        for cell in self.cells:
            path = self.path(cell)
            yield cell, read_json(path)["result"] if not cell.missing and path.exists() else None

    def draw(self) -> Path | None:
        """The experiment's picture, where it has one and all that it takes."""
        kind, path = self.experiment.picture, self.folder / f"{self.experiment.name}.png"
        found = [(cell, result) for cell, result in self.results() if result is not None]
        if kind is None or not found:
            return None
        if kind == "shots":
            lines: dict[str, list[tuple[int, float, float]]] = {}
            for cell, result in found:
                if "accuracy" in result:
                    point = (cell.settings["tasks"]["n_shot"], result["accuracy"], result.get("interval", 0.0))
                    lines.setdefault(cell.row.name, []).append(point)
            return draw_shots(lines, path)
        sheets = {cell.key: (cell.row.name, self.world.work / result["file"]) for cell, result in found}
        return (draw_grid if kind == "grid" else draw_map)(list(sheets.values()), path)

    def write(self) -> Path:
        """Write results.json and table.md as far as there are results; the latter's path."""
        found = list(self.results())
        record = {
            "experiment": self.experiment.name,
            "title": self.experiment.title,
            "source": self.experiment.source,
            "quick": self.quick,
            "machine": self.machine,
            "models": sorted({cell.settings["base"] for cell, _ in found if "base" in cell.facts}),
            "cells": [
                {
                    "row": cell.row.name,
                    "column": cell.column.name,
                    "shows": cell.column.shows,
                    "asked": cell.asked,
                    "settings": cell.settings,
                    "key": cell.key,
                    "result": result,
                    **({"not run": cell.missing} if cell.missing else {}),
                }
                for cell, result in found
            ],
        }
        write_json(self.folder / "results.json", record)
        there = {(cell.row.name, cell.column.name): result for cell, result in found if result is not None}
        return write_text(self.folder / "table.md", markdown(self.experiment, there, record))


def prepare_run(
    table: str | PathLike[str] | Experiment,
    *,
    data: str | PathLike[str] | None = None,
    work_dir: str | PathLike[str] = "reproduced",
    base: str | None = None,
    weights: str | PathLike[str] | None = None,
    prior: str | None = None,
    prior_weights: str | PathLike[str] | None = None,
    text_encoder: str | None = None,
    n_tasks: int | None = None,
    image_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quick: bool = False,
    skip_missing: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> Run:
    """Read an experiment and check every cell of it, before anything runs.

    Args:
        table: a name of `experiment_names`, a JSON file, or an `Experiment`.
        data: folder that holds the sets, see `Sets`; not needed by a rehearsal.
        work_dir: keeps adapters, surrogates and cells; tables of one base may share it, and what is there is not done
            again.
        base: model in place of the experiment's; cells that name their own keep it.
        weights: local safetensors file for `base`, for every cell of that base that names none of its own.
        prior: batch-norm network in place of the settings', a timm name or a safetensors file.
        prior_weights: local weights for it.
        text_encoder: folder or Hub id of a CLIP model, for what reads class names.
        n_tasks: in place of the experiment's.
        image_size: side in pixels; the model's own when None.
        device, dtype: where and in which precision.
        quick: rehearse at small size on drawn images; see `shrink`.
        skip_missing: cells whose sets or texts are not there are marked "not run" instead of being an error; all else
            that is missing, such as a file of weights, stays one.
        workers: threads that read images.
        quiet: no progress bars.

    Raises:
        ValueError, FileNotFoundError, TypeError, ImportError: an unknown table, method, set or setting; a set, a class,
            a package or an encoder that is missing; parts that overlap; a work folder of another machine, version or a
            rehearsal's.
    """
    experiment = table if isinstance(table, Experiment) else load_experiment(table)
    given: dict[str, Any] = {"base": base, "weights": weights, "prior": prior, "prior_weights": prior_weights}
    given |= {"text_encoder": text_encoder, "n_tasks": n_tasks}
    if weights is not None and base is None:
        raise ValueError(f"`weights` must come with `base`, the model that they are for, got {weights} alone.")
    layer: Settings = {}
    if base is not None:
        layer["base"] = base
    if prior is not None:
        layer["surrogates"] = {"inversion": {"prior": prior}}
    if n_tasks is not None:
        layer["tasks"] = {"n_tasks": n_tasks}
    if layer:
        experiment = replace(experiment, settings=merge(experiment.settings, layer))
    where, precision = resolve(device, dtype)
    work = Path(work_dir).expanduser()
    if quick:
        world = World(
            open=drawn_set,
            work=work,
            load=tiny_backbone,
            load_prior=tiny_prior,
            device=where,
            dtype=precision,
            text_encoder=Letters(),
            encode=Letters().encode,
            read_text=drawn_text,
        )
    else:
        if data is None:
            raise ValueError("`data` must be the folder that holds the sets, got none; `quick` runs without.")
        sets = Sets(data, experiment.sets)
        world = World(
            open=sets.open,
            work=work,
            load=partial(_load, image_size=image_size, device=where),
            load_prior=partial(_prior, weights=prior_weights, dtype=precision, device=where),
            device=where,
            dtype=precision,
            read_text=sets.read_text,
            root=sets.root,
        )
        if text_encoder is not None:
            from ..fewshot.methods.text import ClipText

            world.text_encoder = ClipText.load(text_encoder, device=where)
            world.encode = world.text_encoder.encode
    world.workers, world.quiet = workers, quiet
    cells = []
    for row in experiment.rows:
        for column in experiment.columns:
            asked = experiment.cell(row, column)
            takes = weights is not None and asked["base"] == base and asked.get("weights") is None
            if takes:
                asked["weights"] = str(weights)
            cells.append(Cell(row, column, asked, shrink(asked) if quick else asked, takes_weights=takes))
    for step in (partial(_check, also=experiment.also), _name):  # what is known at once, then what takes reading
        cells = [_told(cell, world, step, skip_missing) for cell in cells]
    if not quick:
        _refuse_idle(world, cells, {name: value for name, value in given.items() if value is not None})
    elif named := [name for name, value in {"data": data, **given}.items() if value is not None]:
        logger.warning("a rehearsal has its own models and images: %s left out", ", ".join(named))
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {where}, {precision}"
    machine += f", torch {torch.__version__}, lorarecycle {__version__}"
    machine += "" if image_size is None else f", {image_size} px"
    _refuse_other(work, quick, machine)
    return Run(experiment, world, cells, quick, machine)


def reproduce(table: str | PathLike[str] | Experiment, **settings: Any) -> Path:
    """Run an experiment; the path of its table, beside which results.json lies. Arguments and errors as in
    `prepare_run`, and RuntimeError where cells failed."""
    return prepare_run(table, **settings)()


def _told(cell: Cell, world: World, step: Callable[[Cell, World], Cell], skip_missing: bool) -> Cell:
    """A step of a cell's preparation, whose errors say where they are; sets that are missing may be put up with."""
    where = f"row {cell.row.name!r}, column {cell.column.name!r}"
    try:
        return cell if cell.missing else step(cell, world)
    except TOLD as error:
        if skip_missing and isinstance(error, SetMissing):
            return replace(cell, missing=str(error))
        kind = next(kind for kind in TOLD if isinstance(error, kind))  # its own kind may take other arguments
        raise kind(f"{where}: {error}") from error


def _check(cell: Cell, world: World, also: tuple[str, ...]) -> Cell:
    check_settings(cell.settings)
    kind = find_kind(cell.settings)
    unknown = [] if not kind.shows else [one for one in (cell.column.shows, *also) if one not in kind.shows]
    if unknown:
        raise ValueError(f"`shows` must be one of {', '.join(kind.shows)}, got {unknown[0]!r}.")
    kind.check(world, cell.settings)
    return cell


def _name(cell: Cell, world: World) -> Cell:
    """The cell with what it hangs on: its models are loaded, its images read once."""
    facts = cell_facts(world, cell.settings)
    return replace(cell, facts=facts, key=key_of(facts))


def _refuse_idle(world: World, cells: list[Cell], given: Mapping[str, Any]) -> None:
    """Raise where an argument reaches no cell; it would be thought to have done something."""
    if any(cell.missing for cell in cells):
        return
    with_model = [cell for cell in cells if "base" in cell.facts]
    used = {"base"} if any(cell.settings["base"] == given.get("base") for cell in with_model) else set()
    used |= {"weights"} if any(cell.takes_weights for cell in with_model) else set()
    used |= {"n_tasks"} if any(find_kind(cell.settings).few_shot for cell in cells) else set()
    used |= {"prior", "prior_weights"} if "prior" in world.used else set()
    for name in sorted(set(given) - used - world.used):
        raise ValueError(
            f"`{name}` must be left out of this experiment, none of whose cells uses it, got {given[name]}."
        )


def _refuse_other(work: Path, quick: bool, machine: str) -> None:
    path = work / "settings.json"
    if not path.exists():
        return
    found: Mapping[str, Any] = read_json(path)
    if found != {"quick": quick, "machine": machine}:
        raise ValueError(
            f"`work_dir` must be a new folder or one of the same kind of run (quick={quick}, {machine}), got {work} of "
            f"quick={found.get('quick')}, {found.get('machine')}; choose another."
        )


def _load(base: str, weights: str | None, *, image_size: int | None, device: torch.device) -> Backbone:
    return Backbone.load(base, weights=weights, image_size=image_size, device=device)


def _prior(
    config: InversionConfig,
    *,
    weights: str | PathLike[str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> BatchNormPrior | None:
    if config.prior is None or config.prior_weight == 0 or config.steps == 0:
        return None
    size, relative = config.prior_size, config.prior_relative
    return BatchNormPrior.load(config.prior, weights=weights, size=size, dtype=dtype, relative=relative).to(device)
