"""Adapters whose update is zero everywhere: they change no model, and would only thin out what the others share."""

from __future__ import annotations

from collections.abc import Sequence

from .adapter import Adapter
from .stored import is_dead


def leave_out_dead(adapters: Sequence[Adapter]) -> tuple[list[Adapter], list[str]]:
    """Adapters whose update is not zero everywhere, and a note that names the others.

    Raises:
        ValueError: all of them are zero.
    """
    alive = [adapter for adapter in adapters if not is_dead(adapter)]
    dead = sorted(adapter.name for adapter in adapters if is_dead(adapter))
    if not alive:
        raise ValueError(f"`adapters` must change the model, got updates of zero in all: {', '.join(dead)}.")
    return alive, [f"left out, as their update is zero: {len(dead)} adapters ({', '.join(dead)})"] if dead else []
