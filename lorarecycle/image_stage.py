"""The stage of a run that makes its images: painted pictures for all adapters, or surrogates of each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .adapters.adapter import Adapter
from .config import RecycleConfig, as_plain
from .inversion.invert import Inverter
from .inversion.pictures import painted_surrogate
from .inversion.prior import BatchNormPrior
from .inversion.stored import StoredSurrogate
from .inversion.surrogate import Surrogate
from .meta.bank import AnySurrogate
from .meta.drawn import DrawnImages
from .runtime.checkpoint import differences
from .runtime.claims import Claims
from .runtime.distributed import ALONE, Group
from .runtime.graphs import Graphs
from .runtime.progress import Progress, track
from .runtime.seeds import derive
from .runtime.shared_folder import require_seen
from .runtime.steps import Compile
from .stages import Needs
from .vit.backbone import Backbone
from .vit.lora import LoRA
from .work_dir import WorkDir

WAIT = 0.2
"""Seconds between two looks at what other processes are doing."""


@dataclass(frozen=True)
class ImageStage:
    """Makes the images that are drawn; those that a folder has already are not made again.

    Attributes:
        backbone: in float32.
        config: settings of the run.
        dtype: precision of the teachers.
        drawn: which images.
        inverted: the adapters that have images of their own; `drawn` counts them.
        prior: loads the batch-norm network, where anything has to be inverted.
        compile, graphs, quiet: as in `recycle`.
        group: processes that share the work through the folder.
    """

    backbone: Backbone
    config: RecycleConfig
    dtype: torch.dtype
    drawn: DrawnImages
    inverted: Sequence[Adapter]
    prior: Callable[[], BatchNormPrior | None]
    compile: Compile = None
    graphs: Graphs = None
    quiet: bool = False
    group: Group = ALONE

    def run(self, start: LoRA, folder: WorkDir | None) -> list[AnySurrogate]:
        """All images: files of the folder, or parts of one tensor without one.

        Args:
            start: the warm start, whose attention masks painted pictures.
            folder: where the files go.
        """
        if Needs.of(self.config).pictures:
            if not self.group.leads and folder is not None:  # the first process paints them
                self.group.wait()
                require_seen(folder.pictures)
            found = self._pictures(start, folder)
            if self.group.leads:
                self.group.wait()
            return [found]
        return self._in_memory() if folder is None else self._in_files(folder)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Of inversion, as a file has them."""
        return json.loads(json.dumps(as_plain(self.config.inversion)))  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of all images, (n, 3, H, W)."""
        size = self.config.inversion.image_size or self.backbone.image_size
        return len(self.drawn.rows), 3, size, size

    def _pictures(self, start: LoRA, folder: WorkDir | None) -> AnySurrogate:
        if folder is None or not folder.pictures.exists():
            teacher, needs, inversion = self.backbone, Needs.of(self.config), self.config.inversion
            if needs.warm_start and (needs.scores or inversion.prune):
                teacher = teacher.merge(start.to_adapter(name="warm start", like=teacher))
            teacher = teacher.clone().to(self.dtype)
            rows, seed = self.drawn.rows, self.config.seed
            pictures = painted_surrogate(
                teacher, inversion, seed=seed, scores=needs.scores, rows=rows, quiet=self.quiet
            )
            if folder is None:
                return pictures
            pictures.save(folder.pictures)
        return self._open(folder.pictures, None)

    def _in_memory(self) -> list[AnySurrogate]:
        images, start, found = torch.empty(*self.shape, dtype=torch.uint8), 0, list[AnySurrogate]()
        make = self._maker()
        with self._bar(len(self.drawn.adapters)) as bar:
            for number, i in enumerate(self.drawn.adapters):
                made = make(number, i)
                own = images[start : start + len(made.images)].copy_(made.images)
                found.append(replace(made, images=own))  # held once: meta-training takes the whole tensor
                start += len(own)
                bar.update()
        return found

    def _in_files(self, folder: WorkDir) -> list[AnySurrogate]:
        """Whoever is free claims the next adapter; what others do at the moment is waited for at the end."""
        make, makers, claims = self._maker(), self.drawn.adapters, Claims(folder.claims)
        for i in makers:  # before hours of work
            if folder.surrogates[i].exists():
                self._open(folder.surrogates[i], self.inverted[i])
        first = self.group.own(len(makers))[0]
        left = [*range(first, len(makers)), *range(first)]  # processes begin at different places
        with self._bar(len(makers)) as bar:
            while left:
                waiting = []
                for number in left:
                    path = folder.surrogates[makers[number]]
                    if not path.exists():
                        with claims.take(path.stem) as mine:
                            if not mine:
                                waiting.append(number)
                                continue
                            if not path.exists():
                                make(number, makers[number]).save(path)
                    bar.update()
                if len(waiting) == len(left):
                    time.sleep(WAIT)
                left = waiting
        self.group.wait()
        if self.group.leads:
            claims.clear()
        for path in folder.surrogates.values():
            require_seen(path)
        return [self._open(folder.surrogates[i], self.inverted[i]) for i in makers]

    def _open(self, path: Path, adapter: Adapter | None) -> StoredSurrogate:
        """The images of an adapter, or those that depend on none.

        Raises:
            ValueError: a damaged file, or one of another adapter or of other settings.
        """
        found = StoredSurrogate(path)
        wanted = "painted pictures" if adapter is None else f"images made of adapter {adapter.name!r}"
        if found.adapter_digest != ("" if adapter is None else adapter.weights_digest()):
            there = f"images of adapter {found.adapter!r}" if found.adapter else "painted pictures"
            raise ValueError(f"{path} must hold {wanted}, got {there}; remove the file, and they are made again.")
        differing = differences(found.config, self._settings)
        if differing:
            raise ValueError(
                f"{path} must hold {wanted} by the settings of this run, got others, which differ in "
                f"{', '.join(differing)}; remove the file, and they are made again."
            )
        return found

    def _bar(self, count: int) -> Progress[int]:
        """Counts adapters, unless each has a bar of its own."""
        optimised = self.config.inversion.steps > 0
        return track(range(count), "label pictures", unit="adapters", quiet=self.quiet or optimised)

    def _maker(self) -> Callable[[int, int], Surrogate]:
        """Inverts the i-th adapter, the `number`-th that is; what it needs is loaded with the first one."""
        needs, config, count = Needs.of(self.config), self.config, len(self.drawn.adapters)
        inverters: list[Inverter] = []

        def make(number: int, i: int) -> Surrogate:
            if not inverters:
                settings, prior = config.inversion, self.prior()
                options = {"dtype": self.dtype, "compile": self.compile, "graphs": self.graphs}
                inverters.append(Inverter(self.backbone, config=settings, prior=prior, **options))  # type: ignore[arg-type]
            return inverters[0](
                self.inverted[i],
                seed=derive(config.seed, "adapter", i),
                teacher_logits=needs.teacher_logits,
                scores=needs.scores,
                rows=self.drawn.of(i),
                title=f"invert adapters ({number + 1} of {count})",
                quiet=self.quiet,
            )

        return make
