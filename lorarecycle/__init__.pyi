from .adapters.adapter import Adapter, Head
from .config import EvaluateConfig, InversionConfig, MetaConfig, RecycleConfig, TuneConfig
from .data.dataset import LabelledImages
from .data.load import load_dataset
from .fewshot.classifier import FewShotClassifier
from .fewshot.evaluate import evaluate
from .inversion.invert import invert
from .inversion.prior import BatchNormPrior
from .inversion.surrogate import Surrogate
from .meta.train import meta_train
from .meta.warm_start import warm_start
from .pipeline import make_plan, recycle
from .plan import Plan
from .tuning import tune
from .vit.backbone import Backbone

__version__: str

__all__ = [
    "Adapter",
    "Backbone",
    "BatchNormPrior",
    "EvaluateConfig",
    "FewShotClassifier",
    "Head",
    "InversionConfig",
    "LabelledImages",
    "MetaConfig",
    "Plan",
    "RecycleConfig",
    "Surrogate",
    "TuneConfig",
    "evaluate",
    "invert",
    "load_dataset",
    "make_plan",
    "meta_train",
    "recycle",
    "tune",
    "warm_start",
]
