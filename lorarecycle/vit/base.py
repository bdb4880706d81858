"""The backbone that a set of adapters is for: the one that is given, else the one that they name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.peft.names import find_family
from .backbone import Backbone

logger: logging.Logger = logging.getLogger(__name__)

BaseLike = Backbone | str | PathLike[str] | nn.Module


def find_base(base: BaseLike | None, adapters: Sequence[Adapter]) -> Backbone:
    """The backbone in float32, as adapters are merged before it is cast.

    Args:
        base: a `Backbone`, which is left as it is, or what `Backbone.load` takes; the model that the adapters name when
            None.
        adapters: whose `base_model` counts where `base` is None.

    Raises:
        ValueError: no base given, and none named or several; see `Backbone.load` for the rest.
    """
    if isinstance(base, Backbone):
        return base.clone().float()
    if base is None:
        named = common_base(adapters)
        if named is None:
            raise ValueError("`base` must be given, for the adapters do not name the model they were tuned on.")
        return Backbone.load(named.base_model).float()
    return Backbone.load(base).float()


def common_base(adapters: Sequence[Adapter]) -> Adapter | None:
    """One of the adapters that name the base, which is the same for all; None where none does.

    Raises:
        ValueError: they name several.
    """
    named = {_place(adapter.base_model): adapter for adapter in adapters if adapter.base_model}
    if len(named) > 1:
        raise ValueError(
            f"`adapters` must be tuned on one base, got {len(named)}: "
            + ", ".join(f"{one!r} (adapter {adapter.name!r})" for one, adapter in sorted(named.items()))
            + "; recycle them apart, or give `base` where these are names of one model."
        )
    return next(iter(named.values()), None)


def doubts(backbone: Backbone, adapters: Sequence[Adapter]) -> list[str]:
    """What the files of adapters say of their base that the backbone is not, though shapes fit: a line for each kind.

    Another name may be of the same model; another family of transformers, an architecture that is not known here or
    another way of resizing images hardly is. The base that is given counts in any case.
    """
    kinds: dict[str, list[str]] = {}
    for adapter in adapters:
        family = find_family(adapter.base_class)
        if adapter.base_model and _place(adapter.base_model) != _place(backbone.name):
            kinds.setdefault(f"another base, {adapter.base_model!r}", []).append(adapter.name)
        if family and backbone.family and family != backbone.family:
            kinds.setdefault(f"another family, {adapter.base_class}", []).append(adapter.name)
        elif adapter.base_class and not adapter.base_class.startswith(("timm.", "transformers.", "torch.")):
            kinds.setdefault(f"an architecture not known here, {adapter.base_class}", []).append(adapter.name)
        if adapter.resize and adapter.resize != backbone.fit.resize:
            kinds.setdefault(f"images prepared by resize={adapter.resize!r}", []).append(adapter.name)
    if not kinds:
        return []
    shown = "; ".join(f"{kind} ({_some(names)})" for kind, names in sorted(kinds.items()))
    own = ", ".join(filter(None, (backbone.family, f"resize={backbone.fit.resize!r}")))
    return [f"the base {backbone.name!r} ({own}) counts, though files of adapters say otherwise: {shown}"]


def warn_of_doubts(backbone: Backbone, adapters: Sequence[Adapter]) -> None:
    """`doubts` in the log."""
    for line in doubts(backbone, adapters):
        logger.warning(line)


def _place(name: str) -> str:
    """A folder's absolute path, any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
