"""What experiments read, and what a cell hangs on: settings with their defaults filled in, and content by digest.

What moves a result is in the facts; how it is written, where it lies, and what a cell does not read are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.load_many import load_all
from ..config import InversionConfig, as_plain
from ..data.lazy import Dataset
from ..fewshot.methods.base import Method, TextEncoder
from ..inversion.prior import BatchNormPrior
from ..vit.backbone import Backbone
from .settings import inversion_config, meta_config, tune_config

Facts = dict[str, Any]


@dataclass(kw_only=True)
class Sources:
    """What an experiment reads.

    Attributes:
        open: (set, part) -> images on disk; see `Sets.open`.
        load: (base, weights) -> the model in float32, on the device.
        load_prior: the batch-norm network of some settings; None where they want none.
        device, dtype: where and in which precision cells run.
        text_encoder: of class names, for methods that read them; it has a `digest()`.
        encode: sentences to vectors, for text task vectors; None where there is no encoder.
        read_text: name -> text, for the language table.
        root: folder of the data.
        used: of "prior" and "text_encoder" what some cell hangs on.
    """

    open: Callable[[str, str], Dataset]
    load: Callable[[str, str | None], Backbone]
    load_prior: Callable[[InversionConfig], BatchNormPrior | None]
    device: torch.device
    dtype: torch.dtype
    text_encoder: TextEncoder | None = None
    encode: Callable[[list[str]], Any] | None = None
    read_text: Callable[[str], str] | None = None
    root: Path | None = None
    used: set[str] = field(default_factory=set, repr=False)
    _backbones: dict[tuple[str, str | None], tuple[Backbone, str]] = field(default_factory=dict, repr=False)
    _priors: dict[tuple[Any, ...], tuple[BatchNormPrior | None, str]] = field(default_factory=dict, repr=False)
    _own: dict[str, list[Adapter]] = field(default_factory=dict, repr=False)
    _text: tuple[Any, str] | None = field(default=None, repr=False)

    def backbone(self, settings: Mapping[str, Any]) -> Backbone:
        """The model of a cell in float32, as adapters are merged before it is cast."""
        return self._backbone(settings)[0]

    def prior(self, config: InversionConfig) -> BatchNormPrior | None:
        """The batch-norm network of some settings; None where they want none."""
        return self._prior(config)[0]

    def place(self, path: str) -> Path:
        """A folder of the user's: under the root where it is there, else as it stands."""
        inside = (self.root or Path()) / path
        return inside if inside.exists() else Path(path).expanduser()

    def own_adapters(self, settings: Mapping[str, Any]) -> list[Adapter]:
        """The adapters of the user's folder, which fit the model."""
        folder = settings["adapters"]["folder"]
        if folder not in self._own:
            self._own[folder] = load_all(self.place(folder)).adapters
        for adapter in self._own[folder]:
            self.backbone(settings).check(adapter)
        return self._own[folder]

    def count(self, settings: Mapping[str, Any]) -> int:
        """How many adapters a cell has."""
        chosen = settings["adapters"]
        return len(self.own_adapters(settings)) if chosen.get("folder") else chosen["count"]

    def base_facts(self, settings: Mapping[str, Any]) -> Facts:
        """The model: its weights, how images come to it, and its names: activation, norms and pooling are not in its
        weights, but go with its name."""
        found, digest = self._backbone(settings)
        return {"base": [settings["base"], found.name, digest]}

    def adapter_facts(self, settings: Mapping[str, Any]) -> Facts:
        """The adapters, but not how many: the first of many are the first of few."""
        chosen = settings["adapters"]
        if chosen.get("folder"):
            adapters: Any = [adapter.digest() for adapter in self.own_adapters(settings)]
        else:
            adapters = {
                "of": [[name, self.open(name, "train").digest()] for name in chosen["of"]],
                "n_way": chosen["n_way"],
                "tune": [as_plain(tune_config(chosen["tune"], r, 0)) for r in chosen["ranks"]],
            }
            adapters |= {"per_class": chosen["per_class"]} if chosen.get("per_class") else {}
        return {**self.base_facts(settings), "adapters": adapters, "seed": settings["seed"]}

    def surrogate_facts(self, settings: Mapping[str, Any]) -> Facts:
        """The surrogates, of however many adapters."""
        chosen, config = settings["surrogates"], inversion_config(settings)
        facts: Facts = {"real": config.images_per_class}
        if chosen["images"] == "inverted":
            digest = self._prior(config)[1]
            facts = {k: v for k, v in as_plain(config).items() if digest or not k.startswith("prior")}
            facts |= {"prior": digest} if digest else {}
            facts |= {"head": self.text_facts()} if chosen.get("head") == "text" else {}
        return {**self.adapter_facts(settings), "surrogates": facts}

    def learn_facts(self, settings: Mapping[str, Any]) -> Facts:
        """What learns from the surrogates, and how."""
        return {
            **self.surrogate_facts(settings),
            "count": self.count(settings),
            "learn": settings["learn"],
            "mask": settings["surrogates"]["mask"],
            "meta": as_plain(meta_config(settings)),
        }

    def text_facts(self) -> str | None:
        """The text encoder; its weights are read once."""
        found: Any = self.text_encoder
        self.used.add("text_encoder")
        if found is None:
            return None
        if self._text is None or self._text[0] is not found:
            self._text = found, found.digest()
        return self._text[1]

    def _backbone(self, settings: Mapping[str, Any]) -> tuple[Backbone, str]:
        name = settings["base"], settings.get("weights")
        if name not in self._backbones:
            found = self.load(*name)
            self._backbones[name] = found, found.digest()
        return self._backbones[name]

    def _prior(self, config: InversionConfig) -> tuple[BatchNormPrior | None, str]:
        if config.prior is None or config.prior_weight == 0 or config.steps == 0:
            return None, ""
        self.used.add("prior")
        name = config.prior, config.prior_size, config.prior_relative
        if name not in self._priors:
            found = self.load_prior(config)
            self._priors[name] = found, "" if found is None else found.digest()
        return self._priors[name]


def method_facts(method: Method) -> Facts:
    """A method by its class and all its settings, given or not."""
    given: Any = method
    own = [f.name for f in given.__dataclass_fields__.values() if f.init]
    return {"method": type(method).__name__, "options": {name: getattr(method, name) for name in own}}
