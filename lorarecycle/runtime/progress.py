"""Progress bars with rate and time left, which a caller can switch off."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, quiet: bool = False, initial: int = 0) -> tqdm[T]:
    """Iterate over `items` under a progress bar on standard error.

    Args:
        items: what to iterate over.
        description: text in front of the bar.
        quiet: show nothing.
        initial: steps done by an earlier run.
    """
    total = len(items) + initial if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    return tqdm(items, desc=description, disable=quiet, initial=initial, total=total, dynamic_ncols=True)


class Stopwatch:
    """Seconds of stages that follow one another, by their names, in `laps`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last lap."""
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the time since the last lap under a name."""
        self.laps[name] = time.perf_counter() - self._start
        self.restart()
