"""`reproduce`: an experiment's file made ready to run, with everything checked before anything starts."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..config import InversionConfig
from ..inversion.prior import BatchNormPrior
from ..runtime.device import resolve
from ..runtime.files import read_json
from ..runtime.version import __version__
from ..vit.backbone import Backbone
from .experiment import Experiment, load_experiment
from .kinds import cell_facts, find_kind
from .quick import Letters, drawn_set, drawn_text, shrink, tiny_backbone, tiny_prior
from .run import Cell, Run
from .sets import SetMissing, Sets
from .settings import Settings, check_settings, key_of, merge
from .world import World

logger: logging.Logger = logging.getLogger(__name__)

TOLD = (FileNotFoundError, TypeError, ImportError, ValueError)
"""Errors of a cell's preparation that say in which cell they are."""


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
            load=partial(tiny_backbone, device=where),
            load_prior=partial(tiny_prior, dtype=precision, device=where),
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
