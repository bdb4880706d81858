"""One run of `recycle` with everything loaded and checked: its plan, and the doing of it in reading order."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from .adapters.adapter import Adapter
from .adapters.stored import head_of
from .config import RecycleConfig, as_plain
from .image_stage import ImageStage
from .inversion.invert import load_prior
from .inversion.prior import BatchNormPrior
from .meta.bank import AnySurrogate
from .meta.drawn import NOTHING_DRAWN, DrawnImages, find_drawn
from .meta.episodes import Layout
from .meta.train import MetaTraining, first_factors, meta_train
from .plan import Plan, unused_settings, where_images_are
from .runtime.distributed import ALONE, Group, join
from .runtime.files import write_json, write_text
from .runtime.graphs import Graphs
from .runtime.memory import image_budget
from .runtime.progress import Stopwatch
from .runtime.shared_folder import require_seen
from .runtime.steps import Compile
from .stages import Needs, StageMaker
from .summary import summarise
from .vit.backbone import Backbone
from .vit.lora import LoRA
from .work_dir import WorkDir, describe_run

logger: logging.Logger = logging.getLogger(__name__)

ImageChoice = Literal["drawn", "all"]
"""Which images are made: those that meta-training draws, which is known beforehand, or all of them."""


@dataclass
class Job:
    """A run of `recycle` with everything loaded and checked; `prepare` makes it.

    Attributes:
        adapters: all that take part, in canonical order.
        inverted: those with images of their own.
        backbone: in float32, as adapters are merged before it is cast.
        config: settings.
        given_prior: network in place of `config.inversion.prior`.
        dtype: precision of the run.
        images, memory_budget: see `recycle`.
        notes: what a user should know, a line each.
        said: how many of them, from the first, are in the log already.
        seconds: that each stage took, once it has run.
    """

    adapters: list[Adapter]
    inverted: list[Adapter]
    backbone: Backbone
    config: RecycleConfig
    given_prior: BatchNormPrior | None
    dtype: torch.dtype
    images: ImageChoice
    memory_budget: int | None
    notes: tuple[str, ...]
    said: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """What the settings ask for."""
        return Needs.of(self.config)

    @cached_property
    def prior(self) -> BatchNormPrior | None:
        """The network that is given, else the one that the settings name; None where none is needed."""
        if not self.needs.prior or self.given_prior is not None:
            return self.given_prior
        return load_prior(self.backbone, self.config.inversion, self.dtype)

    @cached_property
    def drawn(self) -> DrawnImages | None:
        """The images that are made; None where the settings need none."""
        needs, inversion = self.needs, self.config.inversion
        if not needs.images:
            return None
        if needs.pictures:
            layouts = [Layout("", (), None, inversion.pictures, teacher_logits=False)]
        else:
            heads = [(a.name, head_of(a)) for a in self.inverted]
            per_class, logits = inversion.images_per_class, needs.teacher_logits
            layouts = [
                Layout.planned(name, head.class_names, per_class, teacher_logits=logits) for name, head in heads if head
            ]
        return find_drawn(layouts, self.config.meta, self.config.seed, everything=self.images == "all")

    def plan(self) -> Plan:
        """What the run does and about how long it takes."""
        return self._plan(self.prior)

    def _plan(self, prior: BatchNormPrior | None) -> Plan:
        stages = StageMaker(self.backbone, self.config, self.dtype).all(self.adapters, self.drawn, prior)
        model, precision = self.backbone, str(self.dtype).removeprefix("torch.")
        title = f"{len(self.adapters)} adapters of {model.name}, on {model.device} in {precision}"
        memory = ""
        if self.drawn is not None:
            memory = where_images_are(self.image_bytes, self.budget, given=self.memory_budget is not None)
        return Plan(stages, self.needs, unused_settings(self.config), self.notes, title, memory)

    def run(
        self,
        work_dir: str | PathLike[str] | None = None,
        *,
        name: str = "meta-lora",
        compile: Compile = None,
        graphs: Graphs = None,
        quiet: bool = False,
    ) -> Adapter:
        """Do it, together with the other processes where torchrun started several; as in `recycle`."""
        group = join(self.backbone.device)
        quiet = quiet or not group.leads
        if group.size > 1 and work_dir is None and self.drawn is not None:
            raise ValueError(
                f"`work_dir` must be given where {group.size} processes share a run, got none; choose a folder on a "
                "disk that all of them see."
            )
        for line in self.notes[self.said :]:
            logger.warning(line)
        folder, resumed = None, False
        if work_dir is not None:
            folder = WorkDir(Path(work_dir).expanduser(), self._makers())
            # A prior that cannot be had is said before anything is written.
            prior = self.given_prior if folder.finished else self.prior
            run = describe_run(self.config, self.adapters, self.backbone, self.dtype, prior, images=self.images)
            if folder.finished and self.given_prior is None:
                run["prior"] = folder.recorded_prior()  # images are there: it is not asked for again
            if not group.leads:  # the first process makes it
                group.wait()
                require_seen(folder.record)
            resumed = folder.open(run)
            if group.leads:
                group.wait()
        plan = None  # where a summary is wanted: of the backbone as it is now
        if group.leads and folder is not None and not (resumed and folder.summary.exists()):
            plan = self._plan(None if folder.finished else self.prior)
        clock = Stopwatch()
        start = self._start(group)
        if self.needs.warm_start:
            clock.lap("warm start")
        with ExitStack() as at_the_end:
            shelf = folder
            if shelf is None and self.image_bytes > self.budget:
                shelf = WorkDir(Path(at_the_end.enter_context(TemporaryDirectory())), self._makers())
            clock.restart()
            stage = self._images(compile, graphs, quiet, group)
            surrogates = stage.run(start, shelf) if self.drawn is not None else []
            clock.lap("images")
            trained = self._train(start, surrogates, folder, name, compile, graphs, quiet, group)
        self.seconds |= clock.laps | trained.seconds
        if folder is not None and group.leads:
            rows = "".join(f"{step},{loss:.9g}\n" for step, loss in enumerate(trained.losses.tolist()))
            write_text(folder.losses, "step,loss\n" + rows)
            if plan is not None:
                facts = summarise(plan, self.seconds, self.adapters, trained.meta_lora, resumed=resumed)
                write_json(folder.summary, facts)
            trained.meta_lora.save(folder.meta_lora, config=as_plain(self.config), sources=self.adapters)
        group.wait()  # what the first process writes is there when any returns
        return trained.meta_lora

    def _start(self, group: Group) -> LoRA:
        """What training starts from: found by the first process, and told to the others."""
        config = self.config.meta if group.leads else replace(self.config.meta, init="random")
        start = first_factors(self.backbone, self.adapters, config, self.config.seed)
        group.share(start.parameters())
        return start

    def _makers(self) -> dict[int, Adapter]:
        """Those that images are made of, by their place among `inverted`."""
        wanted = self.drawn.adapters if self.drawn is not None and not self.needs.pictures else []
        return {i: self.inverted[i] for i in wanted}

    def _images(
        self, compile: Compile = None, graphs: Graphs = None, quiet: bool = True, group: Group = ALONE
    ) -> ImageStage:
        return ImageStage(
            self.backbone,
            self.config,
            self.dtype,
            self.drawn or NOTHING_DRAWN,
            self.inverted,
            lambda: self.prior,
            compile=compile,
            graphs=graphs,
            quiet=quiet,
            group=group,
        )

    def _train(
        self,
        start: LoRA,
        surrogates: Sequence[AnySurrogate],
        folder: WorkDir | None,
        name: str,
        compile: Compile,
        graphs: Graphs,
        quiet: bool,
        group: Group,
    ) -> MetaTraining:
        return meta_train(
            self.backbone if self.dtype in (None, self.backbone.dtype) else self.backbone.clone().to(self.dtype),
            surrogates,
            config=self.config.meta,
            adapters=self.adapters,
            start=start,
            drawn=self.drawn,
            memory_budget=self.budget,
            seed=self.config.seed,
            checkpoint=None if folder is None else folder.checkpoint,
            name=name,
            compile=compile,
            graphs=graphs,
            quiet=quiet,
            group=group,
        )

    @cached_property
    def image_bytes(self) -> int:
        """Of all images that are made."""
        return math.prod(self._images().shape)

    @cached_property
    def budget(self) -> int:
        """Bytes that images may take in memory."""
        return image_budget(self.backbone.device, self.memory_budget)
