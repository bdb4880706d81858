"""What the cells of an experiment share: models, adapters, surrogates; made when one asks for them, kept in files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..data.dataset import LabelledImages
from ..fewshot.images import TaskImages
from ..fewshot.methods.zero_shot import text_head
from ..inversion.surrogate import Surrogate
from ..runtime.seeds import derive, stream
from ..vit.backbone import Backbone
from .facts import Sources
from .settings import inversion_config, key_of, tune_config
from .stages import draw_class_lists, inverted, label_by_teacher, tuned

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class World(Sources):
    """Where an experiment runs: its sources, and what is made of them.

    Attributes:
        work: folder of adapters, surrogates, meta-LoRAs and cells, each under the digits of what it hangs on.
        workers: threads that read images.
        quiet: no progress bars.
        images: of sets that were tested on, with the features that models gave them.
        prepared: methods that are ready, with the seconds that it took: what does not hang on tasks is prepared once.
    """

    work: Path
    workers: int = 1
    quiet: bool = False
    images: dict[Any, TaskImages] = field(default_factory=dict, repr=False)
    prepared: dict[str, tuple[Any, float]] = field(default_factory=dict, repr=False)
    _models: dict[str, Backbone] = field(default_factory=dict, repr=False)
    _tuned: dict[str, list[Adapter]] = field(default_factory=dict, repr=False)
    _surrogates: dict[str, list[Surrogate]] = field(default_factory=dict, repr=False)

    def model(self, settings: Mapping[str, Any]) -> Backbone:
        """The model of a cell in the precision of the run."""
        name = key_of(self.base_facts(settings))
        if name not in self._models:
            self._models[name] = self.backbone(settings).clone().to(dtype=self.dtype)
        return self._models[name]

    def folder(self, kind: str, facts: Mapping[str, Any]) -> Path:
        """Where what hangs on some facts is kept."""
        return self.work / kind / key_of(facts)

    def class_lists(self, settings: Mapping[str, Any], count: int) -> list[tuple[str, list[str]]]:
        """Set and classes of each of the first adapters' tasks; sets take turns."""
        chosen, seed = settings["adapters"], settings["seed"]
        sets = chosen["of"]
        lists = {}
        for i, name in enumerate(sets):
            own = len(range(i, count, len(sets)))
            lists[name] = iter(
                draw_class_lists(self.open(name, "train").class_names, own, chosen["n_way"], seed=derive(seed, name))
                if own
                else []
            )
        return [(name, next(lists[name])) for name in (sets[i % len(sets)] for i in range(count))]

    def task_images(self, settings: Mapping[str, Any], first: int | None = None) -> Iterator[LabelledImages]:
        """The images that each adapter is tuned on, one set in memory at a time; of all of them, or of the first."""
        for name, classes in self.class_lists(settings, self._first(settings, first)):
            yield self._train_images(settings, name, classes)

    def _train_images(self, settings: Mapping[str, Any], name: str, classes: list[str]) -> LabelledImages:
        images, most = self.open(name, "train").select_classes(classes), settings["adapters"].get("per_class")
        if most is not None:
            mixed = torch.randperm(len(images), generator=stream(settings["seed"], "tuning images", name))
            kept = [mixed[images.labels[mixed] == c][:most] for c in range(len(classes))]
            images = images.subset(torch.cat(kept).sort().values)
        return images.load(self.backbone(settings).fit, workers=self.workers)

    def adapters(self, settings: Mapping[str, Any], first: int | None = None) -> list[Adapter]:
        """The adapters of a cell, all or the first: tuned where their folders are not there, or the user's own."""
        chosen, count = settings["adapters"], self._first(settings, first)
        if chosen.get("folder"):
            return self.own_adapters(settings)[:count]
        folder, ranks = self.folder("adapters", self.adapter_facts(settings)), chosen["ranks"]
        found = self._tuned.setdefault(folder.name, [])
        for i, (name, classes) in enumerate(self.class_lists(settings, count)):
            path = folder / f"task-{i}"
            if i < len(found):
                continue
            if path.exists():
                found.append(Adapter.load(path))
                continue
            config = tune_config(chosen["tune"], ranks[i % len(ranks)], derive(settings["seed"], "adapter", i))
            images = self._train_images(settings, name, classes)
            found.append(tuned(self.model(settings), images, path, config=config, quiet=self.quiet))
        return found[:count]

    def surrogates(self, settings: Mapping[str, Any], first: int | None = None) -> list[Surrogate]:
        """Images of the adapters' classes, all or the first: inverted, or their own (Tab. 9); the last stay loaded."""
        facts = self.surrogate_facts(settings)
        key, count = key_of(facts), self._first(settings, first)
        if len(self._surrogates.get(key, ())) < count:
            self._surrogates.clear()
            make = self._real if settings["surrogates"]["images"] == "real" else self._inverted
            self._surrogates[key] = make(settings, count)
        return self._surrogates[key][:count]

    def _first(self, settings: Mapping[str, Any], first: int | None) -> int:
        return self.count(settings) if first is None else min(first, self.count(settings))

    def _real(self, settings: Mapping[str, Any], count: int) -> list[Surrogate]:
        per_class, backbone, found = inversion_config(settings).images_per_class, self.backbone(settings), []
        taken = zip(self.adapters(settings, count), self.task_images(settings, count), strict=True)
        for i, (adapter, images) in enumerate(taken):
            few = min(per_class, *images.counts)
            drawn = images.sample(few, stream(settings["seed"], "real images", i))
            found.append(label_by_teacher(backbone, adapter, drawn, dtype=self.dtype))
        return found

    def _inverted(self, settings: Mapping[str, Any], count: int) -> list[Surrogate]:
        config, backbone, adapters = inversion_config(settings), self.backbone(settings), self.adapters(settings, count)
        if settings["surrogates"].get("head") == "text":
            adapters = [self._with_words(adapter, backbone) for adapter in adapters]
        prior, folder = self.prior(config), self.folder("surrogates", self.surrogate_facts(settings))
        if prior is None:
            config = replace(config, prior=None)
        return [
            inverted(
                backbone,
                adapter,
                folder / f"{i}.safetensors",
                config=config,
                prior=prior,
                seed=derive(settings["seed"], "inversion", i),
                dtype=self.dtype,
                quiet=self.quiet,
            )
            for i, adapter in enumerate(adapters)
        ]

    def _with_words(self, adapter: Adapter, backbone: Backbone) -> Adapter:
        """The adapter with the text features of its classes for a head (Tab. 14)."""
        assert self.text_encoder is not None  # checked
        assert adapter.head is not None
        head = text_head(self.text_encoder, adapter.head.class_names, backbone.embed_dim, pool=adapter.head.pool)
        return adapter.with_head(head)
