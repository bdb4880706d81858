"""`lorarecycle task-vector` and `lorarecycle generate fit | sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..adapters.peft.config import CONFIG_FILE
from ..generate.config import GenerateConfig
from ..generate.task_vectors import FILE
from .common import Flat, Machine, Manners


@dataclass(frozen=True)
class TaskVector:
    """Write the vector of a task: the mean feature of its images, or a text feature of its description."""

    output: Path
    """Safetensors file to write; `TASK/task_vector.safetensors` is where `generate fit` looks for it."""
    data: str | None = None
    """Images of the task: a folder with a sub-folder per class, a npz file, or a named set, as for `tune`."""
    classes: tuple[str, ...] = ()
    """Classes of the task; all when left out."""
    split: str | None = None
    """Part of the data: train, val, test."""
    download: bool = False
    """Fetch a named data set when it is absent."""
    text: str | None = None
    """Description of the task, in place of images."""
    clip: str | None = None
    """Folder or Hub id of the CLIP model that reads the description."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..generate import task_vectors
        from ..runtime.files import require_place

        if (self.data is None) == (self.text is None):
            raise ValueError(
                "`--data` or `--text` must be given, one of the two; see `lorarecycle task-vector --help`."
            )
        require_place(self.output, "--output")
        if self.text is not None:
            if self.clip is None:
                raise ValueError("`--clip` must name the model that reads `--text`, got none.")
            vector = task_vectors.text_vector(self.text, task_vectors.clip_encoder(self.clip))
            facts = {"text": self.text, "encoder": self.clip}
        else:
            from ..data.load import load_dataset

            backbone = self.machine.backbone()
            quiet = self.manners.quiet
            data = load_dataset(self.data or "", self.split, download=self.download, mixed=backbone.fit, quiet=quiet)
            data = data.select_classes(self.classes) if self.classes else data
            vector = task_vectors.task_vector(backbone, data.images)
            facts = {"images": str(len(data)), "encoder": backbone.name}
        print(task_vectors.save_vector(self.output, vector, **facts))


@dataclass(frozen=True)
class Fit:
    """Learn adapters and the vectors of their tasks; writes one generator file."""

    tasks: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """A folder per task (what `tune --save-last` wrote, a folder of adapters, or one adapter), or one folder that
    holds those."""
    output: Path = Path("generator.safetensors")
    """File to write."""
    task_vectors: tuple[Path, ...] = ()
    """One file for each task, in their order (by name where one folder holds them); `task_vector.safetensors` in its
    folder when left out."""
    checkpoint: Path | None = None
    """File written on the way; a fit that was stopped goes on from it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; bfloat16 on a GPU that has it."""
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[GenerateConfig, Flat] = field(default_factory=GenerateConfig)

    def run(self) -> None:
        import logging

        from ..generate import training
        from ..generate.icm_lora import LoRAGenerator
        from ..generate.task_vectors import load_vector
        from ..runtime.files import require_place

        require_place(self.output, "--output")
        if not self.manners.quiet:
            training.logger.setLevel(logging.INFO)  # how long it will take
        folders = find_tasks(self.tasks, len(self.task_vectors))
        files = self.task_vectors or [folder / FILE for folder in folders]
        if len(files) != len(folders):
            raise ValueError(f"`--task-vectors` must be one for each of the {len(folders)} tasks, got {len(files)}.")
        adapters, vectors = [], []
        for folder, file in zip(folders, files, strict=True):
            found = find_adapters(folder)
            adapters += found
            vectors += [load_vector(file)] * len(found)
        generator = LoRAGenerator.fit(
            adapters,
            vectors,
            config=self.config,
            device=self.device,
            dtype=self.dtype,
            checkpoint=self.checkpoint,
            quiet=self.manners.quiet,
        )
        print(generator.save(self.output))


@dataclass(frozen=True)
class Sample:
    """Generate adapters for a task vector, as PEFT folders."""

    generator: Annotated[Path, tyro.conf.Positional]
    """File that `generate fit` wrote."""
    task_vector: Path
    """File that `task-vector` wrote."""
    output: Path
    """Folder for the adapters: `sample-000`, `sample-001` and so on."""
    n: int = 1
    """How many."""
    seed: int = 0
    """Seed of the draws."""
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..generate import load_generator
        from ..generate.task_vectors import load_vector
        from ..runtime.files import require_place

        require_place(self.output, "--output", folder=True)
        found = load_generator(self.generator).sample(load_vector(self.task_vector), self.n, seed=self.seed)
        for i, adapter in enumerate(found):
            print(adapter.save(self.output / f"sample-{i:03d}"))


@dataclass(frozen=True)
class Generate:
    """Make adapters from task vectors (ICM-LoRA): `generate fit` learns, `generate sample` makes."""

    action: Annotated[
        Annotated[Fit, tyro.conf.subcommand("fit")] | Annotated[Sample, tyro.conf.subcommand("sample")], Flat
    ]

    def run(self) -> None:
        self.action.run()


def find_tasks(paths: Sequence[Path], vectors: int = 0) -> list[Path]:
    """The folders of the tasks that the paths mean.

    The tasks in one folder are its sub-folders that hold adapters; a folder of adapters with one vector is one task.

    Args:
        paths: folders of tasks, or one folder that holds those.
        vectors: how many task vectors are given; with 0 they are looked for in the folders.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: one folder that holds no tasks, or adapters without a vector.
    """
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"`tasks` must be folders of adapters, got {path}: no such folder.")
    if len(paths) != 1:
        return list(paths)
    (folder,) = paths
    holders = [child for child in sorted(folder.glob("[!.]*")) if _adapters(child)]
    if vectors:
        several = vectors > 1 or any(_adapters(child) != [child] for child in holders)
        return holders if holders and several else [folder]
    if (folder / FILE).exists():
        return [folder]
    found = sorted(file.parent for file in folder.glob(f"[!.]*/{FILE}"))
    if not found:
        raise ValueError(
            f"`tasks` must hold folders with {FILE} in them, got {folder} with none; write them with "
            "`lorarecycle task-vector`, or give `--task-vectors`."
        )
    bare = sorted(set(holders) - set(found))
    if bare:
        raise ValueError(
            f"`tasks` must all have {FILE}, got adapters without it in {bare[0]}; write it with `lorarecycle "
            "task-vector`, or name the folders to learn from one by one."
        )
    return found


def find_adapters(folder: Path) -> list[Path]:
    """The adapters of a task, in the order of their names: its checkpoints, else those in it, else itself.

    Raises:
        ValueError: none.
    """
    found = _adapters(folder)
    if not found:
        raise ValueError(f"`tasks` must be folders of PEFT adapters, got {folder} without one.")
    return found


def _adapters(folder: Path) -> list[Path]:
    for where in ("checkpoints/[!.]*", "[!.]*", "."):  # none that is being written
        found = sorted(path.parent for path in folder.glob(f"{where}/{CONFIG_FILE}"))
        if found:
            return found
    return []
