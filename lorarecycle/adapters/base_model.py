"""What readers of other formats ask of the model that factors are for, such as a `Backbone`."""

from __future__ import annotations

from typing import Protocol


class BaseModel(Protocol):
    """A model with sites."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_blocks: int

    def site_shape(self, site: str) -> tuple[int, int]: ...


def require_base(base: object) -> None:
    """Raises TypeError for what is no such model."""
    if not hasattr(base, "site_shape"):
        raise TypeError(
            f"`base` must be a Backbone, got {type(base).__name__}; load one with `Backbone.load`, which takes names, "
            "folders and modules."
        )
