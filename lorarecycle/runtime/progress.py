"""Progress with rate and time left: a bar in a terminal, a plain line now and then in a file or pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

EVERY = 30.0
"""Seconds between two lines."""


def track(items: Iterable[T], name: str, *, unit: str = "steps", quiet: bool = False, initial: int = 0) -> Progress[T]:
    """Show on standard error how far an iteration is.

    In a terminal or notebook that is a bar, elsewhere a line such as "meta-training: 40/100 steps, 3.1 steps/s, 20 s
    left" every 30 seconds and at the end. Nothing to iterate over shows nothing.

    Args:
        items: what to iterate over.
        name: of the stage.
        unit: what is counted, in the plural.
        quiet: show nothing.
        initial: how many an earlier run has done.
    """
    return Progress(items, name, unit, quiet, initial)


class Progress(Generic[T]):
    """An iteration that is shown; or, as a context manager, a count that `update` moves.

    Attributes:
        total: number of items, those of an earlier run included; None when unknown.
        done: how many are done, likewise.
    """

    def __init__(self, items: Iterable[T], name: str, unit: str, quiet: bool, initial: int) -> None:
        count = len(items) if isinstance(items, Sized) else None
        self.total: int | None = None if count is None else count + initial
        self.done = initial
        self._items = items
        self._display = None if quiet or count == 0 else (name, unit)
        self._shown: _Bar | _Lines | None = None

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                self._show()
                yield item
                self.update()

    def __enter__(self) -> Progress[T]:
        if self.total is not None:  # how long the first item takes counts; what is empty is known from here
            self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown.close(self.done, finished=kind is None and self.done >= (self.total or 0))
        self._shown = None

    def update(self, n: int = 1) -> None:
        """Count n items as done."""
        self._show()
        self.done += n
        if self._shown is not None:
            self._shown.update(self.done)

    def set_postfix(self, values: Mapping[str, Any] | None = None, *, refresh: bool = False, **more: Any) -> None:
        """Show values behind the count from its next change on, such as a loss; `refresh` shows them at once."""
        if self._shown is not None:
            self._shown.note({**(values or {}), **more})
            if refresh:
                self._shown.refresh(self.done)

    def _show(self) -> None:
        if self._display is not None and self._shown is None:
            kind = _Bar if _is_interactive() else _Lines
            self._shown = kind(*self._display, self.total, self.done)


class _Bar:
    """tqdm's."""

    def __init__(self, name: str, unit: str, total: int | None, initial: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(desc=name, unit=f" {unit}", total=total, initial=initial, dynamic_ncols=True)

    def update(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def note(self, values: Mapping[str, Any]) -> None:
        self._bar.set_postfix(values, refresh=False)

    def refresh(self, done: int) -> None:
        self._bar.refresh()

    def close(self, done: int, *, finished: bool) -> None:
        self._bar.close()


class _Lines:
    """A line every `EVERY` seconds, and one at the end."""

    def __init__(self, name: str, unit: str, total: int | None, initial: int) -> None:
        self._name, self._unit, self._total, self._initial = name, unit, total, initial
        self._note = ""
        self._start = self._last = time.monotonic()

    def update(self, done: int) -> None:
        if time.monotonic() - self._last >= EVERY:
            self.refresh(done)

    def note(self, values: Mapping[str, Any]) -> None:
        self._note = "".join(f", {key} {value}" for key, value in values.items())

    def refresh(self, done: int) -> None:
        self._last = time.monotonic()
        rate = self._rate(done)
        left = [f"{duration((self._total - done) / rate)} left"] if self._total is not None and rate else []
        self._write(done, rate, left)

    def close(self, done: int, *, finished: bool) -> None:
        took = duration(time.monotonic() - self._start)
        self._write(done, self._rate(done), [f"done in {took}" if finished else f"stopped after {took}"])

    def _rate(self, done: int) -> float:
        return (done - self._initial) / max(time.monotonic() - self._start, 1e-6)

    def _write(self, done: int, rate: float, more: list[str]) -> None:
        count = f"{done}" if self._total is None else f"{done}/{self._total}"
        speed = f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
        known = time.monotonic() - self._start >= 0.1  # before that it is noise
        text = ", ".join([f"{self._name}: {count} {self._unit}", *[f"{speed} {self._unit}/s"] * known, *more])
        with suppress(AttributeError, OSError, ValueError):  # no standard error, a broken pipe, a closed file
            sys.stderr.write(f"{text}{self._note}\n")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds in words: "1.3 s", "20 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _is_interactive() -> bool:
    """Whether standard error is a terminal, or this a notebook."""
    from tqdm.auto import tqdm

    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return in_notebook or (sys.stderr is not None and sys.stderr.isatty())


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
