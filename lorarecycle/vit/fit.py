"""Whether adapters fit a backbone: sites, shapes and input normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapters.adapter import Adapter
from .backbone import Backbone


def leave_out_unfit(backbone: Backbone, adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str]]:
    """Adapters that fit a backbone, and a note for each of the others.

    Raises:
        ValueError: none does.
    """
    fitting, notes = [], []
    for adapter in adapters:
        try:
            check_fit(backbone, adapter)
            fitting.append(adapter)
        except ValueError as error:
            notes.append(f"left out, as it does not fit: {error}")
    if not fitting:
        raise ValueError(f"`adapters` must hold one that fits {backbone.name!r}, got none: {'; '.join(notes)}")
    return fitting, notes


def check_fit(backbone: Backbone, adapter: Adapter) -> None:
    """Make sure that an adapter fits.

    Raises:
        ValueError: sites, shapes or an input normalisation that the backbone does not have.
    """
    backbone.check(adapter)
    for what, own, theirs in (("mean", adapter.mean, backbone.mean), ("std", adapter.std, backbone.std)):
        if own is not None and any(abs(a - b) > 1e-3 for a, b in zip(own, theirs, strict=True)):
            raise ValueError(
                f"adapter {adapter.name!r} must be tuned under the input normalisation of the backbone, got {what} "
                f"{own} and {theirs}; pass the right one to `Backbone.load({what}=...)`."
            )
