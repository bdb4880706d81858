"""A finished run as the report reads it from its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..config import RecycleConfig, as_config
from ..inversion.surrogate import Surrogate
from ..meta.train import default_lr, learning_rate
from ..runtime.files import read_object
from ..work_dir import RECORD, WorkDir

ACCURACY = "accuracy.json"
"""File of a run's folder that `measure_run` writes."""


@dataclass(frozen=True, eq=False)
class Run:
    """What the folder of a run holds.

    Attributes:
        work: its files.
        record: run.json: versions, hashes, settings.
        summary: summary.json: plan, seconds, adapters; empty for runs of versions that did not write it.
        losses: of every step of meta-training.
        accuracy: what `measure_run` found; None where nothing has been measured.
    """

    work: WorkDir
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    losses: tuple[float, ...]
    accuracy: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """Of the folder; of the one that it lies in where it has the demo's, "work"."""
        folder = self.work.folder.resolve()
        return folder.parent.name if folder.name == "work" else folder.name

    @cached_property
    def config(self) -> RecycleConfig:
        """Settings of the run."""
        return read_settings(self.record["config"])

    @cached_property
    def meta_lora(self) -> Adapter:
        """What came out."""
        return Adapter.load(self.work.meta_lora)

    @property
    def surrogate_files(self) -> list[Path]:
        """A file for each adapter, or one of painted pictures for all."""
        return sorted(self.work.pictures.parent.glob("*.safetensors"))

    def surrogate(self, file: Path) -> Surrogate:
        """One of `surrogate_files`, with the masks that meta-training used."""
        found, sparsity = Surrogate.load(file), self.config.meta.sparsity
        return found if sparsity is None or found.scores is None else found.masked(sparsity)

    @property
    def rates(self) -> list[float]:
        """Learning rate of each step."""
        meta = self.config.meta
        width = next((f.lora_A.shape[1] for s, f in self.meta_lora.factors.items() if s.endswith((".q", ".v"))), None)
        highest = meta.lr if meta.lr is not None else None if width is None else default_lr(width)
        return [] if highest is None else [learning_rate(step, meta, highest) for step in range(meta.steps)]


def read_run(folder: str | PathLike[str]) -> Run:
    """Read the folder that `recycle(work_dir=...)` filled.

    Raises:
        FileNotFoundError: no folder of a run, or one that is not finished.
        ValueError: files that are damaged.
    """
    work = WorkDir(Path(folder).expanduser())
    if not (work.folder / RECORD).is_file():
        raise FileNotFoundError(f"`run` must be the `work_dir` of a run of `recycle`, got {folder} without {RECORD}.")
    if not (work.losses.is_file() and work.meta_lora.is_dir()):
        raise FileNotFoundError(f"`run` must be finished, got {folder} without a meta-LoRA; start the run again.")
    with open(work.losses, newline="", encoding="utf-8") as file:
        try:
            losses = tuple(float(row["loss"]) for row in csv.DictReader(file))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{work.losses} must hold the columns step and loss as numbers, got {error}.") from error
    accuracy = work.folder / ACCURACY
    return Run(
        work,
        read_object(work.folder / RECORD),
        read_object(work.summary) if work.summary.is_file() else {},
        losses,
        read_object(accuracy) if accuracy.is_file() else None,
    )


def read_settings(plain: Mapping[str, Any]) -> RecycleConfig:
    """Settings from their record in JSON, where tuples are lists and numbers as keys are strings."""

    def native(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {int(key) if str(key).isdigit() else key: native(item) for key, item in value.items()}
        return tuple(map(native, value)) if isinstance(value, list) else value

    return as_config(RecycleConfig, native(plain))
