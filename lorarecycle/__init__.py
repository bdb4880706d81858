"""lorarecycle: many LoRA adapters of a Vision Transformer in, one meta-LoRA out, without their training data.

Public names load on first use: importing the package imports neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adapter import Adapter, Head
    from .backbone import Backbone
    from .classifier import FewShotClassifier
    from .config import EvaluateConfig, InversionConfig, MetaConfig, RecycleConfig, TuneConfig
    from .datasets import LabelledImages, load_dataset
    from .evaluation import evaluate
    from .inversion import invert
    from .lora_stack import LoRAStack
    from .meta import meta_train
    from .prior import BatchNormPrior
    from .recycling import recycle
    from .surrogate import Surrogate
    from .tuning import tune

_HOMES = {
    "Adapter": "adapter",
    "Backbone": "backbone",
    "BatchNormPrior": "prior",
    "EvaluateConfig": "config",
    "FewShotClassifier": "classifier",
    "Head": "adapter",
    "InversionConfig": "config",
    "LabelledImages": "datasets",
    "LoRAStack": "lora_stack",
    "MetaConfig": "config",
    "RecycleConfig": "config",
    "Surrogate": "surrogate",
    "TuneConfig": "config",
    "evaluate": "evaluation",
    "invert": "inversion",
    "load_dataset": "datasets",
    "meta_train": "meta",
    "recycle": "recycling",
    "tune": "tuning",
}

__all__ = [
    "Adapter",
    "Backbone",
    "BatchNormPrior",
    "EvaluateConfig",
    "FewShotClassifier",
    "Head",
    "InversionConfig",
    "LabelledImages",
    "LoRAStack",
    "MetaConfig",
    "RecycleConfig",
    "Surrogate",
    "TuneConfig",
    "evaluate",
    "invert",
    "load_dataset",
    "meta_train",
    "recycle",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorarecycle' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
