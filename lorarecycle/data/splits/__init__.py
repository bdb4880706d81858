"""Which classes of a data set are for tuning, for choosing settings and for reporting: one JSON file for each set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources

PARTS = ("train", "val", "test")


@cache
def class_split(name: str) -> dict[str, tuple[str, ...]]:
    """The classes of each part of a data set.

    Args:
        name: of a file here, such as "cifar_fs"; `split_names` lists them.

    Returns:
        "train", "val" and "test" to class names, in the order that labels count them; none where a set has no classes
        for a part, as those that only test adapters of other domains.

    Raises:
        ValueError: an unknown name, or a file in which two parts share a class.
    """
    if name not in split_names():
        raise ValueError(f"`name` must be one of {', '.join(split_names())}, got {name!r}.")
    content = json.loads(resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    parts = {part: tuple(content[part]) for part in PARTS}
    refuse_overlap(parts, name)
    return parts


def split_names() -> tuple[str, ...]:
    """Names of all sets whose classes are known here."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def refuse_overlap(parts: Mapping[str, Sequence[str]], name: str = "the split") -> None:
    """Make sure that no class is in two parts, nor twice in one: accuracy on seen classes is no few-shot accuracy.

    Args:
        parts: of a split, each with its classes.
        name: of the set, for the message.

    Raises:
        ValueError: there is such a class; it is named.
    """
    seen: dict[str, str] = {}
    for part, classes in parts.items():
        for one in classes:
            if one in seen:
                raise ValueError(
                    f"{name} must have each class in one part only, got {one!r} in {seen[one]} and {part}; take it out "
                    "of one of them."
                )
            seen[one] = part
