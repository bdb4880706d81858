"""lorarecycle: many LoRA adapters of a Vision Transformer in, one meta-LoRA out, without their training data.

Public names are listed in `__init__.pyi` and load on first use: importing the package imports neither torch nor triton.
"""

from typing import Any

import lazy_loader

from .runtime.version import __version__ as __version__

_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_REMOVED = {
    "LoRAStack": "several adapters in one batch were slower than one after the other; `Backbone.merge` folds one in",
    "invert_together": "several adapters in one batch were slower than one after the other; call `invert` for each",
}


def __getattr__(name: str) -> Any:
    if name in _REMOVED:
        raise ImportError(f"`lorarecycle.{name}` was removed in 0.2: {_REMOVED[name]}.")
    return _find(name)
