"""Old names that keep working for one release, with a warning that says what to write instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(removed_in: str, /, **new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose keyword arguments have new names, so that the old ones still work.

    Each use of an old name gives a DeprecationWarning with the name to write and the version that ends the old one.
    `inspect.signature` and the type checker see the new names only.

    Args:
        removed_in: the version that drops the old names, such as "0.3".
        new_names: `old="new"` for each argument.

    Raises:
        TypeError: (when called) an argument given under both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"`{new}` must be given once, got it as `{old}` too; leave `{old}` out.")
                warnings.warn(
                    f"argument `{old}` of `{function.__name__}` is now called `{new}`; the old name goes in version "
                    f"{removed_in}.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
