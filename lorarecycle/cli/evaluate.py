"""`lorarecycle evaluate` and `lorarecycle predict`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..config import EvaluateConfig
from .common import Care, Flat, Machine, Manners, load_meta_lora

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..fewshot.methods.base import Needs, TextEncoder
    from ..inversion.surrogate import Surrogate
    from ..vit.backbone import Backbone


@dataclass(frozen=True)
class Evaluate:
    """Accuracy of a meta-LoRA, of the plain model or of any other method on few-shot tasks, with its 95 % interval."""

    data: Annotated[str | None, tyro.conf.Positional] = None
    """As for `tune`, or a Hugging Face data set; its classes must be unseen by the adapters."""
    meta_lora: str | None = None
    """PEFT folder or Hub id; the plain model when left out."""
    split: str | None = None
    """Part of the data: train, val, test."""
    download: bool = False
    """Fetch a named data set when it is absent."""
    tasks: Path | None = None
    """Task list to use; written by `Tasks.save`."""
    method: str = "nn"
    """Name of the method; `list` prints all of them and what they need."""
    adapters: tuple[str, ...] = ()
    """PEFT folders or Hub ids, or one folder that holds many, for methods that use them."""
    surrogates: Path | None = None
    """Folder of surrogates, such as a work folder of `recycle --preset paper`, for methods that train on them."""
    validation: str | None = None
    """Data of validation classes, for methods whose learning rate is chosen on them."""
    validation_split: str | None = None
    """Part of that data."""
    rate: float | None = None
    """Learning rate of a method that has one, instead of choosing it."""
    text_encoder: str | None = None
    """Folder or Hub id of a CLIP model, for methods that read the classes' names."""
    workers: int = 1
    """Threads that read image files."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)
    config: Annotated[EvaluateConfig, Flat] = field(default_factory=EvaluateConfig)

    def run(self) -> None:
        from ..data.sets import open_dataset
        from ..fewshot.evaluate import evaluate
        from ..fewshot.methods.registry import describe_methods, find_method, make_method, settings_of
        from ..fewshot.tasks import Tasks
        from ..runtime.distributed import join, leads, leave

        if self.method == "list":
            print(describe_methods())
            return
        needs, quiet = find_method(self.method).needs, self.manners.quiet
        if self.data is None:
            raise ValueError("`data` must name labelled images of new classes, got none; '.' is the current folder.")
        self._refuse_idle(needs, settings_of(self.method))
        like = {"distance": self.config.distance, "seed": self.config.seed}
        method = make_method(self.method, like=like, rate=self.rate)
        meta_lora, adapters = load_meta_lora(self.meta_lora), self._adapters()
        tasks = None if self.tasks is None else Tasks.load(self.tasks)
        named = meta_lora if meta_lora is not None else next((a for a in adapters if a.base_model), None)
        backbone = self.machine.backbone(named)
        shared: dict[str, Any] = {"download": self.download, "strict": self.care.level}
        data = open_dataset(self.data, self.split, **shared)
        aside = None
        if self.validation is not None:
            aside = open_dataset(self.validation, self.validation_split, **shared)
        result = evaluate(
            backbone,
            data,
            meta_lora,
            method=method,
            adapters=adapters,
            surrogates=self._surrogates(),
            validation=aside,
            text_encoder=self._text_encoder(backbone),
            config=self.config,
            tasks=tasks,
            workers=self.workers,
            quiet=quiet,
            group=join(backbone.device),
        )
        if leads():
            print(result)
        leave()

    def _refuse_idle(self, needs: Needs, settings: set[str]) -> None:
        """Raise where an option reaches nothing: it would be thought to have done something."""
        plain = EvaluateConfig()
        changed = {f.name for f in fields(plain) if getattr(self.config, f.name) != getattr(plain, f.name)}
        if "distance" in changed - settings:
            raise ValueError(f"`--distance` must be left out for method {self.method!r}, which has its own.")
        listed = sorted(changed & {"n_way", "n_shot", "n_query", "n_tasks", *({"seed"} - settings)})
        if self.tasks is not None and listed:
            flag = listed[0].replace("_", "-")
            raise ValueError(f"`--{flag}` must be left out beside `--tasks`, whose file says what the tasks are.")
        read = {
            "adapters": needs.adapters > 0,
            "surrogates": needs.surrogates,
            "validation": needs.rate,
            "validation_split": needs.rate,
            "text_encoder": needs.text_encoder,
        }
        for name, used in read.items():
            given, flag = getattr(self, name), "--" + name.replace("_", "-")
            if given in (None, ()):
                continue
            if not used:
                raise ValueError(f"`{flag}` must be left out for method {self.method!r}, which does not use it.")
            if name.startswith("validation") and self.rate is not None:
                raise ValueError(
                    f"`{flag}` must be left out beside `--rate`, got {given} beside {self.rate}: a rate that is given "
                    "is not chosen on validation classes."
                )
        if self.validation_split is not None and self.validation is None:
            raise ValueError(
                f"`--validation-split` must come with `--validation`, the data that it is a part of, got "
                f"{self.validation_split} alone."
            )

    def _adapters(self) -> list[Adapter]:
        from ..adapters.load_many import load_all

        if not self.adapters:
            return []
        source = self.adapters[0] if len(self.adapters) == 1 else self.adapters
        return load_all(source, strict=self.care.level).adapters

    def _surrogates(self) -> list[Surrogate] | None:
        from ..inversion.surrogate import Surrogate

        if self.surrogates is None:
            return None
        if not self.surrogates.is_dir():
            raise FileNotFoundError(f"`--surrogates` must be a folder of surrogates, got {self.surrogates}.")
        files = sorted(self.surrogates.rglob("surrogate*/*.safetensors")) or sorted(
            self.surrogates.glob("*.safetensors")
        )
        if not files:
            raise FileNotFoundError(
                f"`--surrogates` must hold surrogates (*.safetensors), got none in {self.surrogates}."
            )
        return [Surrogate.load(file) for file in files]

    def _text_encoder(self, backbone: Backbone) -> TextEncoder | None:
        from ..fewshot.methods.text import ClipText

        return None if self.text_encoder is None else ClipText.load(self.text_encoder, device=backbone.device)


@dataclass(frozen=True)
class Predict:
    """Classify images from a few labelled ones: prints file, class and probability."""

    support: Path
    """Folder with a sub-folder of images per class."""
    query: tuple[Path, ...]
    """Image files to classify."""
    meta_lora: str | None = None
    """PEFT folder or Hub id; the plain model when left out."""
    machine: Annotated[Machine, Flat] = field(default_factory=Machine)
    care: Annotated[Care, Flat] = field(default_factory=Care)
    manners: Annotated[Manners, Flat] = field(default_factory=Manners)

    def run(self) -> None:
        from ..data.folder import ClassFolders, readable
        from ..fewshot.classifier import FewShotClassifier

        support = ClassFolders(self.support, strict=self.care.level)
        queries = readable(self.query) if self.care.level is False else list(self.query)
        meta_lora = load_meta_lora(self.meta_lora)
        classifier = FewShotClassifier(self.machine.backbone(meta_lora), meta_lora)
        names = [support.classes[label] for label in support.targets]
        classifier.fit([file for file, _ in support.samples], names)
        for file, row in zip(queries, classifier.predict_proba(list(queries)), strict=True):
            print(f"{file}\t{classifier.classes_[row.argmax()]}\t{row.max():.4f}")
