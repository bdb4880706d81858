"""What the cells of an experiment share: models, adapters, surrogates; made when one asks for them, kept in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.load_many import load_all
from ..config import InversionConfig
from ..data.dataset import LabelledImages
from ..data.lazy import Dataset
from ..fewshot.images import TaskImages
from ..fewshot.methods.base import TextEncoder
from ..fewshot.methods.zero_shot import text_head
from ..inversion.prior import BatchNormPrior
from ..inversion.surrogate import Surrogate
from ..runtime.seeds import derive, stream
from ..vit.backbone import Backbone
from .settings import inversion_config, key_of, pick, tune_config
from .stages import draw_class_lists, inverted, label_by_teacher, tuned

logger: logging.Logger = logging.getLogger(__name__)

ADAPTERS = ("base", "weights", "adapters", "seed")
SURROGATES = (*ADAPTERS, "surrogates")
"""Settings that adapters and surrogates depend on."""


@dataclass
class World:
    """Where an experiment runs.

    Attributes:
        open: (set, part) -> images on disk; see `Sets.open`.
        work: folder of adapters, surrogates, meta-LoRAs and cells, each under the digits of its settings.
        load: (base, weights) -> the model in float32, on the device.
        prior: the batch-norm network of some settings; None where they want none.
        device, dtype: where and in which precision cells run.
        text_encoder: of class names, for methods that read them.
        encode: sentences to vectors, for text task vectors; None where there is no encoder.
        read_text: name -> text, for the language table.
        root: folder of the data.
        workers: threads that read images.
        quiet: no progress bars.
        images: of sets that were tested on, with the features that models gave them.
        prepared: methods that are ready, with the seconds that it took: what does not hang on tasks is prepared once.
    """

    open: Callable[[str, str], Dataset]
    work: Path
    load: Callable[[str, str | None], Backbone]
    prior: Callable[[InversionConfig], BatchNormPrior | None]
    device: torch.device
    dtype: torch.dtype
    text_encoder: TextEncoder | None = None
    encode: Callable[[list[str]], Any] | None = None
    read_text: Callable[[str], str] | None = None
    root: Path | None = None
    workers: int = 1
    quiet: bool = False
    images: dict[str, TaskImages] = field(default_factory=dict, repr=False)
    prepared: dict[str, tuple[Any, float]] = field(default_factory=dict, repr=False)
    _backbones: dict[tuple[str, str | None], Backbone] = field(default_factory=dict, repr=False)
    _models: dict[tuple[str, str | None], Backbone] = field(default_factory=dict, repr=False)
    _adapters: dict[str, list[Adapter]] = field(default_factory=dict, repr=False)
    _surrogates: dict[str, list[Surrogate]] = field(default_factory=dict, repr=False)

    def backbone(self, settings: Mapping[str, Any]) -> Backbone:
        """The model of a cell in float32, as adapters are merged before it is cast."""
        name = settings["base"], settings.get("weights")
        if name not in self._backbones:
            self._backbones[name] = self.load(*name)
        return self._backbones[name]

    def model(self, settings: Mapping[str, Any]) -> Backbone:
        """The model of a cell in the precision of the run."""
        name = settings["base"], settings.get("weights")
        if name not in self._models:
            self._models[name] = self.backbone(settings).clone().to(dtype=self.dtype)
        return self._models[name]

    def place(self, path: str) -> Path:
        """A folder of the user's: under the root where it is there, else as it stands."""
        inside = (self.root or Path()) / path
        return inside if inside.exists() else Path(path).expanduser()

    def folder(self, kind: str, settings: Mapping[str, Any]) -> Path:
        """Where what some settings make is kept."""
        return self.work / kind / key_of(settings)

    def class_lists(self, settings: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
        """Set and classes of each adapter's task; sets take turns."""
        chosen, seed = settings["adapters"], settings["seed"]
        sets, count = chosen["of"], chosen["count"]
        lists = {}
        for i, name in enumerate(sets):
            own = len(range(i, count, len(sets)))
            lists[name] = iter(
                draw_class_lists(self.open(name, "train").class_names, own, chosen["n_way"], seed=derive(seed, name))
                if own
                else []
            )
        return [(name, next(lists[name])) for name in (sets[i % len(sets)] for i in range(count))]

    def task_images(self, settings: Mapping[str, Any]) -> Iterator[LabelledImages]:
        """The images that each adapter is tuned on, one set in memory at a time."""
        fit = self.backbone(settings).fit
        for name, classes in self.class_lists(settings):
            yield self.open(name, "train").select_classes(classes).load(fit, workers=self.workers)

    def adapters(self, settings: Mapping[str, Any]) -> list[Adapter]:
        """The adapters of a cell, tuned where their folders are not there; those of a folder as they are."""
        wanted = pick(settings, ADAPTERS)
        key = key_of(wanted)
        if key in self._adapters:
            return self._adapters[key]
        chosen = settings["adapters"]
        if chosen.get("folder"):
            found = load_all(self.place(chosen["folder"])).adapters
            for adapter in found:
                self.backbone(settings).check(adapter)
            self._adapters[key] = found
            return found
        folder, model, ranks = self.folder("adapters", wanted), self.model(settings), chosen["ranks"]
        if all((folder / f"task-{i}").exists() for i in range(chosen["count"])):
            found = [Adapter.load(folder / f"task-{i}") for i in range(chosen["count"])]
        else:
            found = []
            for i, images in enumerate(self.task_images(settings)):
                config = tune_config(chosen["tune"], ranks[i % len(ranks)], derive(settings["seed"], "adapter", i))
                found.append(tuned(model, images, folder / f"task-{i}", config=config, quiet=self.quiet))
        self._adapters[key] = found
        return found

    def surrogates(self, settings: Mapping[str, Any]) -> list[Surrogate]:
        """Images of the adapters' classes: inverted, or their own (Tab. 9); the last ones stay loaded."""
        wanted = pick(settings, SURROGATES)
        wanted["surrogates"] = {k: v for k, v in wanted["surrogates"].items() if k != "mask"}
        key = key_of(wanted)
        if key not in self._surrogates:
            self._surrogates.clear()
            made = self._real(settings) if settings["surrogates"]["images"] == "real" else self._inverted(settings)
            self._surrogates[key] = made(self.folder("surrogates", wanted))
        return self._surrogates[key]

    def _real(self, settings: Mapping[str, Any]) -> Callable[[Path], list[Surrogate]]:
        def make(folder: Path) -> list[Surrogate]:
            per_class, backbone = inversion_config(settings).images_per_class, self.backbone(settings)
            found = []
            for i, (adapter, images) in enumerate(
                zip(self.adapters(settings), self.task_images(settings), strict=True)
            ):
                few = min(per_class, *images.counts)
                drawn = images.sample(few, stream(settings["seed"], "real images", i))
                found.append(label_by_teacher(backbone, adapter, drawn, dtype=self.dtype))
            return found

        return make

    def _inverted(self, settings: Mapping[str, Any]) -> Callable[[Path], list[Surrogate]]:
        def make(folder: Path) -> list[Surrogate]:
            config, backbone, adapters = inversion_config(settings), self.backbone(settings), self.adapters(settings)
            if settings["surrogates"].get("head") == "text":
                adapters = [self._with_words(adapter, backbone) for adapter in adapters]
            paths = [folder / f"{i}.safetensors" for i in range(len(adapters))]
            prior = None if all(path.exists() for path in paths) else self.prior(config)
            if prior is None:
                config = replace(config, prior=None)
            return [
                inverted(
                    backbone,
                    adapter,
                    path,
                    config=config,
                    prior=prior,
                    seed=derive(settings["seed"], "inversion", i),
                    dtype=self.dtype,
                    quiet=self.quiet,
                )
                for i, (adapter, path) in enumerate(zip(adapters, paths, strict=True))
            ]

        return make

    def _with_words(self, adapter: Adapter, backbone: Backbone) -> Adapter:
        """The adapter with the text features of its classes for a head (Tab. 14)."""
        assert self.text_encoder is not None  # checked
        assert adapter.head is not None
        head = text_head(self.text_encoder, adapter.head.class_names, backbone.embed_dim, pool=adapter.head.pool)
        return adapter.with_head(head)
