"""Names of classes, and those that say nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(LABEL_)?\d+")


def is_number(name: str) -> bool:
    """Whether a class is merely numbered: "3", or "LABEL_3", which transformers writes where nobody named it. Equal
    numbers of two adapters are no one class."""
    return _NUMBER.fullmatch(name) is not None


def pooled_names(class_names: Sequence[Sequence[str]]) -> list[list[str]]:
    """What the classes of several adapters are called side by side: a name is one class whoever has it, a mere number
    (`is_number`) is its adapter's alone."""
    return [
        [f"{name} of adapter {i}" if is_number(name) else name for name in names] for i, names in enumerate(class_names)
    ]
