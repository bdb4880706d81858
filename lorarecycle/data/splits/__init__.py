"""Which classes of a data set are for tuning, for choosing settings and for reporting: one JSON file for each set."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources


@cache
def class_split(name: str) -> dict[str, tuple[str, ...]]:
    """The classes of each part of a data set.

    Args:
        name: of a file here, such as "cifar_fs".

    Returns:
        "train", "val" and "test" to class names, in the order that labels count them.
    """
    content = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return {part: tuple(content[part]) for part in ("train", "val", "test")}
