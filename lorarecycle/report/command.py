"""The command that repeats a run, from its settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config import RecycleConfig

ROOMS = ("inversion", "meta")


def command_of(config: RecycleConfig, record: Mapping[str, Any], adapters: str = "ADAPTERS") -> str:
    """`lorarecycle recycle` with the flags that lead to this run, from the preset that needs the fewest.

    Args:
        config: settings of the run.
        record: what else it was, see `work_dir.describe_run`.
        adapters: folder of the adapters.
    """
    base = record["base"]
    presets = {name: flags(config, RecycleConfig.preset(name)) for name in ("weights", "paper")}
    preset = min(presets, key=lambda name: len(presets[name]))
    words = ["lorarecycle", "recycle", adapters, "--base", str(base["name"])]
    words += [word for name in ("weights", "image_size") if base.get(name) for word in _pair(name, base[name])]
    words += ["--dtype", str(record["dtype"])]
    words += ["--images", "all"] if record.get("images") == "all" else []
    words += ["--preset", preset] if preset != "weights" else []
    words += ["--seed", str(config.seed)] if config.seed else []
    return shlex.join([*words, *(word for flag in presets[preset] for word in flag)])


def flags(config: RecycleConfig, start: RecycleConfig) -> list[list[str]]:
    """The flags that turn one group of settings into another; the seed plays no part."""
    found = []
    for room in ROOMS:
        ours, theirs = getattr(config, room), getattr(start, room)
        for name in (f.name for f in fields(ours)):
            value = getattr(ours, name)
            if value != getattr(theirs, name):
                found.append(_flag(room, name, value))
    return found


def _pair(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def _flag(room: str, name: str, value: Any) -> list[str]:
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{room}.{word}" if value else f"--{room}.no-{word}"]
    if isinstance(value, dict):
        return [f"--{room}.{word}", *(str(part) for pair in value.items() for part in pair)]
    if isinstance(value, (tuple, list)):
        return [f"--{room}.{word}", *map(str, value)]
    return [f"--{room}.{word}", str(value)]
