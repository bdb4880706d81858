"""An adapter as nothing but named parameters: a ViT's `Adapter`, or any PEFT folder (a language model's too)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Head, LoRAFactors
from ..adapters.peft.config import CONFIG_FILE, AdapterConfig, make_config, read_config
from ..adapters.peft.keys import WEIGHTS_FILE, find_factor, read_weights, sort_keys
from ..adapters.peft.scaling import Sizes
from ..adapters.peft.seal import SEAL, make_seal
from ..runtime.files import save_tensors, write_json
from ..runtime.folders import atomic_folder
from ..runtime.settled import TornFolderError, read_settled

logger: logging.Logger = logging.getLogger(__name__)

_SIZES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""Keys of a PEFT configuration that may differ between the adapters of one generator."""
_IDLE = ("base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision", "runtime_config")
"""Keys that say nothing about what the parameters mean."""


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """The files of a PEFT adapter, whatever model it is for: tensors and configuration as they are.

    Attributes:
        tensors: key -> tensor, of adapter_model.safetensors.
        config: content of adapter_config.json.
        name: what to call it.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> PeftAdapter:
        """Read a PEFT folder.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: damaged files, or (`TornFolderError`) files that were not saved together.
        """
        folder = Path(folder)

        def read() -> PeftAdapter:
            config = read_config(folder / CONFIG_FILE)
            return cls(read_weights(folder), config, folder.resolve().name)

        return read_settled(folder, (CONFIG_FILE, WEIGHTS_FILE), read)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the two files, put in place together; the folder."""
        with atomic_folder(folder, first=WEIGHTS_FILE, last=(CONFIG_FILE,)) as new:
            write_json(new / CONFIG_FILE, dict(self.config))
            seal = make_seal(new, [CONFIG_FILE], self.tensors)
            save_tensors(new / WEIGHTS_FILE, self.tensors, {SEAL: seal}, digests=False)
        return Path(folder)


AnyAdapter = Adapter | PeftAdapter


class Parameters(NamedTuple):
    """What a generator sees of an adapter."""

    tensors: dict[str, Tensor]
    """name -> tensor, in a fixed order"""
    scalings: dict[str, float]
    """module -> scaling of its pair of factors; empty where scalings cannot be told (not plain LoRA)"""
    heads: frozenset[str]
    """names of the tensors that are heads or other modules saved whole"""
    facts: dict[str, Any]
    """JSON: what an adapter is made from again, beside tensors and scalings"""
    name: str


def load_adapter(source: AnyAdapter | str | PathLike[str]) -> AnyAdapter:
    """A ViT's plain LoRA as `Adapter`, any other PEFT folder as `PeftAdapter`.

    Raises:
        FileNotFoundError, ValueError: neither of the two, or a damaged one (NaN, shapes that do not fit).
        TypeError: no adapter and no path.
    """
    if isinstance(source, (Adapter, PeftAdapter)):
        return source
    if not isinstance(source, (str, PathLike)):
        raise TypeError(f"`adapters` must hold Adapter or PeftAdapter objects or folders, got {type(source).__name__}.")
    try:
        return Adapter.load(source)
    except TornFolderError:
        raise
    except ValueError as error:
        if not Path(source).is_dir() or _is_vit(Path(source)):
            raise
        logger.info("%s is read as bare PEFT parameters: %s", source, error)
        return PeftAdapter.load(source)


def read_parameters(adapter: AnyAdapter) -> Parameters:
    """The parameters of an adapter and what it takes to put them back."""
    return _of_vit(adapter) if isinstance(adapter, Adapter) else _of_peft(adapter)


def make_adapter(parameters: Parameters, class_names: tuple[str, ...] = ()) -> AnyAdapter:
    """The adapter that holds these parameters.

    Args:
        parameters: as `read_parameters` gives them; ranks may have grown.
        class_names: of the head, where there is one.
    """
    pairs = _pairs(parameters)
    facts = parameters.facts
    if facts["kind"] == "vit":
        weight = parameters.tensors.get("head.weight")
        head = None if weight is None else Head(weight, parameters.tensors["head.bias"], class_names, facts["pool"])
        mean, std = (facts[key] and tuple(facts[key]) for key in ("mean", "std"))
        return Adapter(pairs, head, base_model=facts["base_model"], mean=mean, std=std, name=parameters.name)
    config = dict(facts["config"])
    if pairs:
        made = make_config(pairs, base_model="", model_class="", library="", modules_to_save=None)
        config |= {key: made[key] for key in _SIZES}
    tensors = {k: t.to(getattr(torch, facts["dtypes"][k])) for k, t in parameters.tensors.items()}
    present = {part for key in tensors for part in key.split(".")}
    config["modules_to_save"] = [m for m in config.get("modules_to_save") or [] if m in present] or None
    return PeftAdapter(tensors, config, parameters.name)


def pair_of(name: str) -> tuple[str, str] | None:
    """(module, "A" or "B") of a factor's name, a PEFT key or `<site>.lora_A`; None for any other tensor."""
    factor = find_factor(f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name)
    return factor and (factor.module, factor.side)


def _is_vit(folder: Path) -> bool:
    """Whether the names in a folder are those of a ViT's plain LoRA: what else is wrong with it is damage."""
    try:
        sort_keys(folder, AdapterConfig(folder / CONFIG_FILE))
    except ValueError:
        return False
    return True


def _of_vit(adapter: Adapter) -> Parameters:
    tensors: dict[str, Tensor] = {}
    for site, pair in adapter.factors.items():
        tensors |= {f"{site}.lora_A": pair.lora_A, f"{site}.lora_B": pair.lora_B}
    head = adapter.head
    if head is not None:
        assert head.bias is not None
        tensors |= {"head.weight": head.weight, "head.bias": head.bias}
    facts = {
        "kind": "vit",
        "base_model": adapter.base_model,
        "mean": adapter.mean and list(adapter.mean),
        "std": adapter.std and list(adapter.std),
        "pool": head.pool if head else "token",
    }
    scalings = {site: pair.scaling for site, pair in adapter.factors.items()}
    return Parameters(tensors, scalings, frozenset({"head.weight", "head.bias"} & set(tensors)), facts, adapter.name)


def _of_peft(adapter: PeftAdapter) -> Parameters:
    tensors = {key: adapter.tensors[key].float() for key in sorted(adapter.tensors)}
    config = json.loads(json.dumps(dict(adapter.config), default=sorted))  # PEFT's own objects hold sets
    for key in ("target_modules", "modules_to_save"):  # whose order says nothing
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    heads = frozenset(key for key in tensors if set(key.split(".")) & set(config.get("modules_to_save") or []))
    meaning = {key: value for key, value in config.items() if key not in _IDLE}
    scalings: dict[str, float] = {}
    if _is_plain_lora(adapter, tensors, heads):
        meaning = {key: value for key, value in meaning.items() if key not in _SIZES}
        scalings = _scalings(adapter, tensors)
    facts = {
        "kind": "peft",
        "config": config,
        "meaning": meaning,
        "dtypes": {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in adapter.tensors.items()},
    }
    return Parameters(tensors, scalings, heads, facts, adapter.name)


def _is_plain_lora(adapter: PeftAdapter, tensors: Mapping[str, Tensor], heads: frozenset[str]) -> bool:
    """Whether ranks may be padded: factors of linear layers and modules saved whole, nothing else."""
    plain = adapter.config.get("peft_type") == "LORA" and not adapter.config.get("use_dora")
    return plain and all(key in heads or (pair_of(key) and tensors[key].ndim == 2) for key in tensors)


def _scalings(adapter: PeftAdapter, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    sizes = Sizes(adapter.config, f"the configuration of {adapter.name!r}")
    ranks = {pair[0]: len(t) for key, t in tensors.items() if (pair := pair_of(key)) and pair[1] == "A"}
    return {module: sizes.scaling(module, r) for module, r in ranks.items()}


def _pairs(parameters: Parameters) -> dict[str, LoRAFactors]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.tensors.items():
        pair = pair_of(name)
        if pair is not None and pair[0] in parameters.scalings:
            sides.setdefault(pair[0], {})[pair[1]] = tensor
    return {m: LoRAFactors(side["A"], side["B"], parameters.scalings[m]) for m, side in sides.items()}
