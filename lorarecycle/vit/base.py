"""The backbone that a set of adapters is for: the one that is given, else the one that they name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike

from torch import nn

from ..adapters.adapter import Adapter
from .backbone import Backbone

logger = logging.getLogger(__name__)

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
        _name_others(base, adapters)
        return base.clone().float()
    if base is None:
        named = {a.base_model: a.name for a in adapters if a.base_model}
        if not named:
            raise ValueError("`base` must be given, for the adapters do not name the model they were tuned on.")
        if len(named) > 1:
            raise ValueError(
                f"`adapters` must be tuned on one base, got {len(named)}: "
                + ", ".join(f"{one!r} (adapter {name!r})" for one, name in sorted(named.items()))
                + "; recycle them apart, or give `base` where these are names of one model."
            )
        return Backbone.load(next(iter(named))).float()
    backbone = Backbone.load(base).float()
    _name_others(backbone, adapters)
    return backbone


def _name_others(backbone: Backbone, adapters: Sequence[Adapter]) -> None:
    """One line in the log where adapters name another model than the one that is given."""
    others = {a.base_model: a.name for a in adapters if a.base_model and a.base_model != backbone.name}
    if others:
        names = ", ".join(f"{base!r} ({name})" for base, name in sorted(others.items()))
        logger.warning("base given counts, though adapters name others: %s", names)
