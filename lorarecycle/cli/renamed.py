"""Old names of flags and of their values: they work for one release, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..config import InversionConfig, MetaConfig
from ..runtime.deprecation import SINCE, renamed

logger: logging.Logger = logging.getLogger(__name__)

_SECTIONS = {"inversion": InversionConfig, "meta": MetaConfig}
_VALUES = {("--inversion.init", "shapes"): "painted"}


def current_flags(args: Sequence[str]) -> list[str]:
    """The arguments with today's names in the place of old ones.

    Raises:
        ValueError: a flag that is gone; the message says why.
    """
    new_names, removed = _flags("RENAMED"), _flags("REMOVED")
    current: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        known = flag.replace("_", "-")
        if known in removed:
            raise ValueError(f"`{flag}` was removed in lorarecycle {SINCE}: {removed[known]}.")
        if known in new_names:
            logger.warning(renamed(flag, new_names[known]))
            flag = new_names[known]
        named = (flag, value) if equals else (current[-1] if current else "", flag)
        if named in _VALUES:
            logger.warning(renamed(" ".join(named), f"{named[0]} {_VALUES[named]}"))
            flag, value = (flag, _VALUES[named]) if equals else (_VALUES[named], value)
        current.append(flag + equals + value)
    return current


def _flags(of: str) -> dict[str, str]:
    """Old flag -> new flag ("RENAMED") or reason ("REMOVED"), of the settings that are flags."""
    names: dict[str, str] = {}
    for section, config in _SECTIONS.items():
        for old, new in getattr(config, of, {}).items():
            flag = f"--{section}.{old}".replace("_", "-")
            names[flag] = f"--{section}.{new}".replace("_", "-") if of == "RENAMED" else new
    return names
